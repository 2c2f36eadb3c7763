"""The cheapest fleet: found among few, never one that breaks the SLO, and a front that nothing beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.capacity import NOT_BUILT, SERVED, TOO_SMALL, front_of
from specdec.run import execute
from tests.test_configs import build

SMALL = (
    "tracking=disabled",
    "experiment.lengths=fixed",
    "experiment.prompt_len=200",
    "experiment.output_len=16",
    "experiment.num_requests=120",
    "experiment.short_requests=40",
    "experiment.only=[chunked]",
    "experiment.tensor_parallels=[1]",
    "experiment.num_trials=12",
)


def searched(folder: Path, *overrides: str) -> dict[str, Any]:
    return execute(build(*SMALL, *overrides, experiment="capacity"), folder, None)


def sheet(folder: Path, name: str, price: float) -> Path:
    """An H100 of another price."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    lines = (Path("conf/hardware") / "h100.yaml").read_text().splitlines()
    lines = [f"price_per_hour_usd: {price}" if line.startswith("price_per_hour") else line for line in lines]
    path.write_text("\n".join(lines).replace("name: h100", f"name: {name}", 1))
    return path


def test_of_two_equally_fast_chips_the_cheaper_one_is_chosen(tmp_path: Path):
    cheap, dear = sheet(tmp_path / "sheets", "cheap", 1.0), sheet(tmp_path / "sheets", "dear", 1.5)
    chips = f"experiment.chips=['{dear}','{cheap}']"
    found = searched(tmp_path / "run", chips, "experiment.replicas=[1,2]", "experiment.rate_per_s=20")
    assert found["cheapest"]["chip"] == "cheap"
    assert found["cheapest"]["replicas"] == 1
    assert found["cheapest"]["verdict"] == SERVED
    assert (tmp_path / "run" / "plots" / "pareto.png").exists()


def test_what_cannot_hold_the_load_is_refused_without_a_simulation(tmp_path: Path):
    found = searched(
        tmp_path, "experiment.chips=[rtx_4090]", "experiment.replicas=[1]", "experiment.rate_per_s=100000"
    )
    assert found["cheapest"] is None and found["front"] == []
    assert found["verdicts"][TOO_SMALL] == found["num_fleets"] == 1
    assert found["simulated_requests"] == 0


def test_a_model_that_does_not_fit_is_said_before_the_search(tmp_path: Path):
    with pytest.raises(ValueError, match=r"built on none of the chips: llama-3\.1-70b does not fit"):
        searched(tmp_path, "experiment.model=llama-3.1-70b", "experiment.chips=[rtx_4090]")
    assert NOT_BUILT == "does not fit"


def test_nothing_beats_the_front():
    served = [
        {"usd_per_hour": usd, "tpot_p99_s": seconds}
        for usd, seconds in ((1.0, 0.04), (2.0, 0.02), (2.0, 0.03), (3.0, 0.02), (4.0, 0.01))
    ]
    front = front_of(served)
    assert [(row["usd_per_hour"], row["tpot_p99_s"]) for row in front] == [
        (1.0, 0.04),
        (2.0, 0.02),
        (4.0, 0.01),
    ]
    for row in front:
        for other in served:
            cheaper, faster = (other[key] <= row[key] for key in ("usd_per_hour", "tpot_p99_s"))
            assert not (cheaper and faster) or other == row
    assert front_of([]) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.chips=[h101]", "did you mean h100"),
        ("experiment.only=[chunkd]", "did you mean chunked"),
        ("experiment.min_share=1.5", r"must be in \(0, 1\]"),
        ("experiment.replicas=[]", "is empty"),
        ("experiment.arrivals=all_at_once", "has no rate of its own"),
    ],
)
def test_wrong_options_name_value_and_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        build(override, experiment="capacity")
