"""How fast are the kernels, against others and against what the chip could do?

On a GPU every op is timed by ``triton.testing.do_bench`` medians beside torch's and, where they are installed,
flash-attn's and flashinfer's, and its ratio to the roofline of the chip's sheet is printed. Without a GPU the same
cases run in torch on the CPU, smaller: a check that they work, not a fact about any kernel. Beside both stands a static
table: what the shapes cost at the peaks of A100, H100, H200 and B200, and what others have published for them. That is
the bar; no GPU is needed for it.

    python -m specdec.run +experiment=kernel_bench
    python -m specdec.run +experiment=kernel_bench experiment.chip=h100 experiment.ops=[paged_attention]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import polars as pl
import torch
from specdec_kernels.ops import TORCH, load_ops

from experiments.common import progress
from experiments.kernel_cases import Case, CaseMaker, Shape, shapes
from sim.hardware import Hardware, load_hardware
from specdec import plots_kernels
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

CHIPS = ("a100", "h100", "h200", "b200")
CPU_SCALE = 16
PUBLISHED = Path(__file__).parent / "data" / "published_kernels.csv"
BAR = {
    "op": "op",
    "shape": "shape",
    "chip": "chip",
    "bound": "bound by",
    "roofline_us": "roofline, µs",
    "published_us": "published, µs",
    "efficiency": "of the roofline",
}
TIMES = {
    "op": "op",
    "shape": "shape",
    "way": "way",
    "us": "µs",
    "vs_ours": "ours is × faster",
    "roofline": "of the roofline",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    bar = static_roofline(options.ops)
    run.log_table("static_roofline", bar)
    known = [row for row in bar if row["published_us"] is not None]
    if known:
        title = "the bar: rooflines and published timings, no measurement of ours"
        run.console.print(summary_table(known, BAR, title=title))
        figure = plots_kernels.published_against_roofline(pl.DataFrame(known))
        run.log_figure("static_roofline", figure)
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else "CPU, torch's ops: no fact about the GPU kernels"
    rows = measure(run, options.ops, on_gpu, load_hardware(options.chip) if options.chip else None)
    run.console.print(summary_table(rows, TIMES, title=where))
    run.log_table("times", rows)
    efficiencies = [row["efficiency"] for row in known]
    return {
        "device": where,
        "is_gpu": on_gpu,
        "times": rows,
        "median_published_efficiency": statistics.median(efficiencies) if efficiencies else None,
    }


def static_roofline(ops: list[str] | None) -> list[dict[str, Any]]:
    """Every shape on every chip: its roofline, and the published time where there is one."""
    published = pl.read_csv(PUBLISHED, comment_prefix="#")
    known = {(row["chip"], row["op"], row["shape"]): row["us"] for row in published.iter_rows(named=True)}
    rows: list[dict[str, Any]] = []
    for chip in CHIPS:
        sheet = load_hardware(chip)
        peaks = sheet.flops_per_s["bfloat16"], sheet.memory_bytes_per_s
        for shape in _wanted(shapes(), ops):
            roofline_us = 1e6 * shape.cost.seconds(*peaks)
            us = known.get((chip, shape.op, shape.name))
            rows.append(
                {
                    "op": shape.op,
                    "shape": shape.name,
                    "chip": chip,
                    "bound": shape.cost.bound(*peaks),
                    "roofline_us": roofline_us,
                    "published_us": us,
                    "efficiency": None if us is None else roofline_us / us,
                }
            )
    return rows


def _wanted(found: list[Shape], ops: list[str] | None) -> list[Shape]:
    known = list(dict.fromkeys(shape.op for shape in found))
    unknown = [op for op in ops or [] if op not in known]
    if unknown:
        raise ValueError(f"experiment.ops={unknown} do not exist: choose from {known}")
    return [shape for shape in found if ops is None or shape.op in ops]


def measure(run: Run, ops: list[str] | None, on_gpu: bool, chip: Hardware | None) -> list[dict[str, Any]]:
    """Medians of every way of every case."""
    device = torch.device("cuda" if on_gpu else "cpu")
    maker = CaseMaker(load_ops("triton") if on_gpu else TORCH, device, torch.bfloat16)
    chosen = _wanted(shapes(1 if on_gpu else CPU_SCALE), ops)
    rows: list[dict[str, Any]] = []
    with progress(run) as bar:
        task = bar.add_task("timing", total=len(chosen))
        for shape in chosen:
            case = maker.case(shape)
            rows += _rows(case, {name: median_us(way, on_gpu) for name, way in case.ways.items()}, chip)
            bar.advance(task)
    return rows


def _rows(case: Case, times: dict[str, float], chip: Hardware | None) -> list[dict[str, Any]]:
    roofline_us = None
    if chip:
        roofline_us = 1e6 * case.shape.cost.seconds(chip.flops_per_s["bfloat16"], chip.memory_bytes_per_s)
    return [
        {
            "op": case.shape.op,
            "shape": case.shape.name,
            "way": way,
            "us": us,
            "vs_ours": us / times["ours"],
            "roofline": None if roofline_us is None else roofline_us / us,
        }
        for way, us in times.items()
    ]


def median_us(way: Callable[[], object], on_gpu: bool) -> float:
    """Median microseconds; on a GPU with a cold cache, as do_bench arranges."""
    if on_gpu:
        from triton.testing import do_bench

        return 1e3 * cast("float", do_bench(way, return_mode="median"))
    way()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.05 and len(seconds) < 20):
        start_s = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - start_s)
    return 1e6 * statistics.median(seconds)
