"""The static roofline and the benchmark of kernels."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from specdec_kernels import costs

from experiments.kernel_bench import CHIPS, static_roofline
from experiments.kernel_cases import shapes
from sim.hardware import load_hardware
from specdec.plots_kernels import published_against_roofline
from tests.experiments.tiny import run_tiny


def test_costs_by_hand():
    cost = costs.linear_cost(2, 3, 5, weight_bits=4)
    assert cost.moved_bytes == 2 * 2 * (3 + 5) + 3 * 5 / 2 and cost.flops == 2 * 2 * 3 * 5
    # Two rows: one query behind three keys, and two queries behind none; one head of 8 for keys, two for queries.
    cost = costs.paged_attention_cost([1, 2], [3, 0], 2, 1, 8)
    assert cost.moved_bytes == 2 * (4 + 2) * 8 * 2 + 2 * 3 * 2 * 8 * 2
    assert cost.flops == 4 * (4 + (1 + 2)) * 2 * 8
    assert cost.seconds(1e30, 1.0) == cost.moved_bytes and cost.bound(1e30, 1.0) == "memory"
    assert cost.seconds(1.0, 1e30) == cost.flops and cost.bound(1.0, 1e30) == "compute"


def test_published_times_are_above_the_roofline_and_cover_every_chip():
    rows = static_roofline(None)
    known = [row for row in rows if row["published_us"] is not None]
    assert {row["chip"] for row in known} == set(CHIPS)
    assert {(row["op"], row["shape"]) for row in known} <= {(shape.op, shape.name) for shape in shapes()}
    for op in ("linear", "paged_attention"):
        assert sum(row["op"] == op for row in known) >= 30
    assert all(0.0 < row["efficiency"] < 1.0 for row in known)
    peak = load_hardware("h100").memory_bytes_per_s
    (one,) = [row for row in known if (row["chip"], row["shape"]) == ("h100", "1x4096x4096")]
    assert one["roofline_us"] == pytest.approx(1e6 * 2 * 4096 * (4096 + 2) / peak)


def test_the_bar_is_drawn():
    known = [row for row in static_roofline(None) if row["published_us"] is not None]
    (axes,) = published_against_roofline(pl.DataFrame(known)).axes
    assert len(axes.collections) == 2 * len(CHIPS)


def test_an_op_that_does_not_exist():
    with pytest.raises(ValueError, match=r"experiment.ops=\['sorting'\] do not exist: choose from"):
        static_roofline(["sorting"])


def test_without_a_gpu_it_says_so(tiny_llama_dir: Path, tmp_path: Path):
    summary = run_tiny("kernel_bench", tiny_llama_dir, tmp_path / "run", "experiment.ops=[rms_norm,silu_mul]")
    if summary["is_gpu"]:
        pytest.skip("there is a GPU here: it measures")
    assert "no fact about the GPU kernels" in summary["device"]
    assert {(row["op"], row["way"]) for row in summary["times"]} == {
        (op, way) for op in ("rms_norm", "silu_mul") for way in ("ours", "torch")
    }
    assert all(row["us"] > 0 and row["roofline"] is None for row in summary["times"])
