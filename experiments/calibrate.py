"""How fast is this device? Timed passes of the target, a fitted cost model with its error, usable in simulations.

Passes over a designed grid of sizes are measured in turn, in an order that changes from round to round, until the
budget is spent; so are short real generations, for the host, sampling and drafting. Each result is written as it
comes, and a stopped run goes on where it was. Curves of known form are fitted (``sim.device_fit``), judged on sizes
left out and on random whole steps that nothing is fitted to. ``hardware/<device>`` in the run's directory is then a
chip for simulations, with the command that uses it.

python -m specdec.run +experiment=calibrate
python -m specdec.run +experiment=calibrate model.name=smollm2-135m experiment.budget_s=120 drafter=none
"""

from __future__ import annotations

import datetime
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import yaml

from experiments import common
from experiments.device_passes import DevicePasses, Size, WholeStep
from experiments.options import controller_options
from experiments.rows_file import Row, appended, fingerprint, read_rows
from sim.cost_model import CostModel
from sim.device_fit import MIXED, DeviceFit, achieved_rates, fit_device, read_passes
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.step_features import StepFeatures
from specdec import plots_calibration
from specdec.config import Config
from specdec.config_experiments import SIM_DTYPES
from specdec.report import summary_table
from specdec.stamp import hardware_stamp, software_stamp
from specdec.tracking import Run

if TYPE_CHECKING:
    from specdec import LLM

COLUMNS = {
    "operator": "operator",
    "num_sizes": "sizes",
    "median_pct": "held-out error, median %",
    "p90_pct": "p90 %",
    "bias_pct": "bias %",
    "pass_median_pct": "of the whole pass, median %",
    "pass_p90_pct": "p90 of it %",
    "spread_pct": "repeats ± %",
}

MIN_ROUNDS = 2
"""Whatever the budget: one alone would show no spread."""


def run(config: Config, run: Run) -> dict[str, Any]:
    bench = _Bench(config, run)
    rows = bench.fill()
    device = next(row for row in rows if row["kind"] == "device")
    fit = _fitted(rows, device)
    name = config.experiment.device_name or _slug(device["device"])
    num_rounds = 1 + max(row["round"] for row in rows if row["kind"] == "dense")
    metadata = _metadata(device, name, num_rounds)
    rates = _rates(fit, device)
    folders = [run.directory, *([Path(config.experiment.output)] if config.experiment.output else [])]
    for folder in folders:
        _write(folder / "hardware" / name, fit, device, metadata, rates)
    table = _error_rows(fit)
    run.console.print(summary_table(table, COLUMNS, title=f"{device['model']} on {device['device']}"))
    _report_whole(run, fit)
    run.log_table("held_out", table)
    run.log_table("points", fit.table)
    run.log_table("whole_steps", fit.whole)
    run.log_figure("operators", plots_calibration.operators(fit.table))
    if fit.whole:
        run.log_figure("whole_steps", plots_calibration.whole_steps(fit.whole))
    command = _command(folders[-1], name, device, _alone_s(fit, device))
    run.console.print(f"use it:\n  {command}", soft_wrap=True, highlight=False)
    return {
        "device": metadata,
        "held_out": fit.held_out,
        "whole_steps": fit.whole_error,
        "rates": rates,
        "num_rounds": num_rounds,
        "measured_s": bench.spent_s,
        "num_passes": len(rows) - 1,
        "folders": [str(folder / "hardware" / name) for folder in folders],
        "command": command,
    }


class _Bench:
    """Measures round after round, writing each result as it comes; those of a stopped run are kept.

    Attributes:
        spent_s: what measuring took so far, in earlier runs as well.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._options = config.experiment
        self._path = run.directory / "passes.jsonl"
        self._hash = fingerprint(config, "budget_s", "device_name", "output")
        self._rows = read_rows(self._path, self._hash)
        self.spent_s = sum(row["wall_s"] for row in self._rows)

    def fill(self) -> list[Row]:
        is_complete = any(row["kind"] == "engine" and row["round"] >= MIN_ROUNDS - 1 for row in self._rows)
        if is_complete and self.spent_s >= self._options.budget_s:
            return self._rows
        llm = common.build_llm(self._config)
        with appended(self._path) as add:
            self._measure(llm, add)
        return self._rows

    def _measure(self, llm: LLM, add: Any) -> None:
        start_s = time.perf_counter()
        passes = DevicePasses(llm.runner, llm.engine.loop.config)
        device = next((row for row in self._rows if row["kind"] == "device"), None)

        def note(row: Row) -> None:
            nonlocal start_s
            now_s = time.perf_counter()
            row |= {"wall_s": now_s - start_s, "config_hash": self._hash}
            start_s = now_s
            self.spent_s += row["wall_s"]
            self._rows.append(row)
            add(row)

        if device is None:
            sizes = passes.affordable(self._options.budget_s)
            device = _device(self._config, llm) | {"kind": "device", "sizes": [list(size) for size in sizes]}
            note(device)
        sizes = [Size(*size) for size in device["sizes"]]
        steps = passes.whole_steps(self._options.whole_steps, sizes, np.random.default_rng(self._config.seed))
        known = {_key(row) for row in self._rows}
        if not any(row["kind"] == "draft" for row in self._rows):
            for row in _draft_rows(self._config, llm, self._host_rows(sizes)):
                note(row)
        for number in count():
            before_s = self.spent_s
            for row in self._round(number, known, passes, llm, sizes, steps):
                note(row)
            round_s = self.spent_s - before_s
            if number >= MIN_ROUNDS - 1 and self.spent_s + round_s > self._options.budget_s:
                return

    def _host_rows(self, sizes: list[Size]) -> list[int]:
        """Rows of the short generations: as many as passes could afford, as each makes a dozen."""
        most = max(size.rows for size in sizes if size.kind == "decode")
        return [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows <= most]

    def _round(
        self,
        number: int,
        known: set[tuple[Any, ...]],
        passes: DevicePasses,
        llm: LLM,
        sizes: list[Size],
        steps: list[WholeStep],
    ) -> Iterator[Row]:
        """What is missing of one round, in an order of its own."""
        cells: list[Size | int] = [*sizes, *range(len(steps))]
        order = np.random.default_rng((self._config.seed, number)).permutation(len(cells))
        for cell in (cells[index] for index in order.tolist()):
            if isinstance(cell, Size):
                row = {**cell._asdict(), "round": number}
                if _key(row) not in known:
                    yield row | {"seconds": passes.size_s(cell)}
                continue
            row = {"kind": MIXED, "round": number, "index": cell}
            if _key(row) not in known:
                features = {name: float(value) for name, value in steps[cell].features._asdict().items()}
                yield row | features | {"seconds": passes.step_s(steps[cell])}
        for rows in self._host_rows(sizes):
            row = {"kind": "engine", "rows": rows, "round": number}
            if _key(row) not in known and (found := _engine_row(llm, rows)):
                yield row | found


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("kind", "round", "rows", "tokens", "context", "index"))


def _engine_row(llm: LLM, rows: int) -> Row | None:
    """Medians over a few steps in which ``rows`` greedy requests decode plainly."""
    from specdec.step_times import _short_run

    limits = replace(llm.engine.loop.config, max_num_seqs=rows)
    seen = _short_run(llm.runner, llm.tokenizer, None, limits, 0)
    if not seen:
        return None
    names = ("sample_s", "overhead_s", "verify_s")
    medians = {name: statistics.median(getattr(outcome, name) for outcome in seen) for name in names}
    return medians | {"mean_context": 8.0 + len(seen) / 2.0, "seconds": sum(medians.values())}


def _draft_rows(config: Config, llm: LLM, rows: list[int]) -> Iterator[Row]:
    """What the configured drafter takes for a proposal, for several numbers of rows."""
    from specdec.drafter import make_drafter
    from specdec.drafter.base import MODEL_FREE
    from specdec.step_times import _short_run

    drafts = int(controller_options(config.speculation).get("max_drafts", 0))
    if (
        config.drafter.name in ("none", "synthetic") or drafts < 1
    ):  # which draft nothing, or know their own prompts only
        return
    drafter = make_drafter(common.drafter_options(config))
    assert drafter is not None
    for number in rows[::2]:
        limits = replace(llm.engine.loop.config, max_num_seqs=number)
        seen = _short_run(llm.runner, llm.tokenizer, drafter, limits, drafts)
        if not seen:
            continue
        names = {source.name for source in getattr(drafter, "sources", [drafter]) if source}
        levels = statistics.median(max(1, int(outcome.draft_depths.max(initial=0))) for outcome in seen)
        yield {
            "kind": "draft",
            "round": 0,
            "rows": number,
            "draft_s": statistics.median(outcome.draft_s for outcome in seen),
            "levels": levels,
            "is_model": not names <= MODEL_FREE,
        }
    own = getattr(drafter, "_runner", None)
    if own is not None:
        passes = DevicePasses(own, llm.engine.loop.config)
        for tokens in (size.tokens for size in passes.grid() if size.kind == "prefill" and size.context == 0):
            seconds = statistics.median(passes.size_s(Size("prefill", 1, tokens, 0)) for _ in range(3))
            yield {"kind": "draft", "round": 0, "tokens": tokens, "prompt_tokens": tokens, "seconds": seconds}


def _device(config: Config, llm: LLM) -> Row:
    """What is measured, and on what."""
    runner, hardware, limits = llm.runner, hardware_stamp(), llm.engine.loop.config
    is_gpu = runner.device.type == "cuda"
    gpu = hardware["gpus"][runner.device.index or 0] if is_gpu else {}
    name, draft = config.model.name, getattr(config.drafter, "model", None)
    shape = {
        key: getattr(runner.config, key)
        for key in "num_layers hidden_size num_heads num_kv_heads head_dim intermediate_size vocab_size".split()
    }
    storage = runner.options.storage(runner.dtype)
    return {
        "model": name if name in MODEL_SHAPES else Path(name).name,
        "device": gpu.get("name", hardware["cpu"]),
        "device_kind": "gpu" if is_gpu else "cpu",
        "is_asynchronous": is_gpu,
        "memory_bytes": int(gpu.get("memory_gb", hardware["memory_gb"]) * 2**30),
        "shape": shape,
        "dtype": config.model.dtype,
        "weight_bytes": runner.dtype.itemsize,
        "kv_element_bytes": storage.itemsize,
        "quantization": config.model.quantization,
        "backend": runner.backend,
        "threads": None if is_gpu else hardware["torch_threads"],
        "torch": software_stamp()["torch"],
        "date": datetime.date.today().isoformat(),
        "draft": draft,
        "limits": {
            key: getattr(limits, key)
            for key in "max_num_seqs max_num_batched_tokens max_model_len block_size num_blocks".split()
        },
    }


def _fitted(rows: list[Row], device: Row) -> DeviceFit:
    source = f"{device['model']} on {device['device']}, {device['backend']}, torch {device['torch']}, {device['date']}"
    names = ("rows", "sample_s", "overhead_s", "verify_s", "mean_context")
    host = [{name: float(row[name]) for name in names} for row in rows if row["kind"] == "engine"]
    if not host:
        raise ValueError(
            "the engine's limits hold no short generation: raise engine.kv_memory_mb or max_model_len"
        )
    return fit_device(
        read_passes(rows),
        pl.DataFrame(host),
        num_layers=device["shape"]["num_layers"],
        source=source,
        mixed=[row for row in rows if row["kind"] == MIXED],
        drafts=[row for row in rows if row["kind"] == "draft"],
        is_asynchronous=device["is_asynchronous"],
    )


def _metadata(device: Row, name: str, num_rounds: int) -> dict[str, str | int | float | None]:
    kept = "model dtype quantization backend threads torch date draft".split()
    origin = f"fitted: measured on {device['device']} ({device['backend']}, torch {device['torch']}, {device['date']})"
    measured = {"hardware": name, "device": device["device"], "num_rounds": num_rounds, "sampling": "greedy"}
    return {"origin": origin, **measured, **{key: device[key] for key in kept}, "tensor_parallel": 1}


def _rates(fit: DeviceFit, device: Row) -> dict[str, float]:
    shape = ModelShape(name=device["model"], **device["shape"])
    params, heads = float(shape.linear_params_per_layer), shape.num_kv_heads * shape.head_dim
    return achieved_rates(
        fit.operators,
        params,
        params * device["weight_bytes"],
        2.0 * heads * device["kv_element_bytes"],
    )


def _write(folder: Path, fit: DeviceFit, device: Row, metadata: Row, rates: dict[str, float]) -> None:
    """The cost model and a sheet that names it."""
    model = CostModel(fit.operators, num_layers=device["shape"]["num_layers"], metadata=metadata)
    model.save(folder)
    sheet = {
        "name": metadata["hardware"],
        "kind": device["device_kind"],
        "sheet_source": "measured, not the vendor's figures: what the fitted curves reach with "
        f"{device['model']} in {device['dtype']} on {device['device']} ({device['backend']}, {device['date']}): FLOP/s "
        "the most of a layer's matrix products, bandwidth reading a layer's weights for one token; memory is the "
        "machine's",
        "flops_per_s": {device["dtype"]: rates["flops_per_s"]},
        "memory_bytes": device["memory_bytes"],
        "memory_bytes_per_s": rates["weight_bytes_per_s"],
        "timings": str(folder.resolve()),
    }
    text = yaml.safe_dump(sheet, sort_keys=False, width=110)
    path = folder / "hardware.yaml"
    path.write_text("# @package hardware\n# Measured by +experiment=calibrate.\n" + text)
    load_hardware(path)  # what is written can be read
    CostModel.load(folder)


def _lengths(device: Row) -> tuple[int, int]:
    """Tokens of the prompts and the outputs of the printed example, within the engine's limits."""
    longest = device["limits"]["max_model_len"]
    return max(1, longest // 8), max(1, longest // 16)


def _alone_s(fit: DeviceFit, device: Row) -> float:
    """Seconds of one request of the printed example when it is alone."""
    model = CostModel(fit.operators, num_layers=device["shape"]["num_layers"])
    prompt, output = (float(length) for length in _lengths(device))
    first = StepFeatures(prompt, 1.0, 0.0, 0.0, 0.0, prompt, prompt * (prompt + 1.0) / 2.0, 0.0, 0.0, 0.0)
    later = StepFeatures(1.0, 1.0, 1.0, 1.0, prompt + output / 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return model.predict_scalar(first).total_s + output * model.predict_scalar(later).total_s


def _command(folder: Path, name: str, device: Row, alone_s: float) -> str:
    """How to simulate this device with the engine's limits and a request for each time that one takes alone; for a
    model whose shape the simulator does not know, how to load the curves."""
    if device["model"] not in MODEL_SHAPES:
        path = folder.resolve() / "hardware" / name
        known = ", ".join(MODEL_SHAPES)
        return f"CostModel.load('{path}')  # {device['model']} is no shape that simulate knows: {known}"
    prompt, output = _lengths(device)
    workload = {"lengths": "fixed", "prompt_len": prompt, "output_len": output, "num_requests": 200}
    options = {"model": device["model"], **device["limits"], **workload, "rate_per_s": f"{1.0 / alone_s:.3g}"}
    if device["dtype"] in SIM_DTYPES:
        options["dtype"] = device["dtype"]
    words = " ".join(f"experiment.{key}={value}" for key, value in options.items())
    chosen = f"--config-dir {folder.resolve()} +experiment=simulate hardware={name}/hardware"
    return f"python -m specdec.run {chosen} {words}"


def _error_rows(fit: DeviceFit) -> list[Row]:
    names = ("median", "p90", "bias", "pass_median", "pass_p90", "spread")
    return [
        {
            "operator": name.replace("_", " "),
            "num_sizes": sum(row["operator"] == name for row in fit.table),
            **{f"{key}_pct": None if (value := errors.get(key)) is None else 100.0 * value for key in names},
        }
        for name, errors in fit.held_out.items()
    ]


def _report_whole(run: Run, fit: DeviceFit) -> None:
    if fit.whole_error is None:
        return
    error = fit.whole_error
    run.console.print(
        f"{error['num_points']} random whole steps, none fitted: error {error['median']:.1%} (median), "
        f"{error['p90']:.1%} (p90), bias {error['bias']:+.1%}",
        highlight=False,
    )


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "device"
