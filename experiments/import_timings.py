"""Published timings in, a fitted profile out: a chip's curves with their source, licence and error on unseen sizes.

python -m specdec.run +experiment=import_timings experiment.source=aiconfigurator experiment.path=DIR
python -m specdec.run +experiment=import_timings experiment.source=vidur experiment.path=DIR experiment.output=OUT

The result is used as ``hardware=<chip> hardware.timings=OUT/<chip>.json``; those of several chips ship with the
package. Splitwise's table of whole steps gives cost models of its models instead (``CostModel.load``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.hardware import load_hardware
from sim.profiles import aiconfigurator, llmservingsim, splitwise, transfer, vidur
from sim.profiles.chips import ChipProfile, load_profile
from sim.vllm_run import chip_named, shape_named
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

COLUMNS = {
    "chip": "chip",
    "operator": "operator",
    "median_pct": "median error %",
    "p90_pct": "p90 error %",
    "bias_pct": "bias %",
    "num_points": "points",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    if options.path is None:
        raise ValueError("experiment.path has no value: give the folder of the published timings")
    folder = Path(options.path)
    if not folder.exists():
        raise ValueError(f"experiment.path={folder} does not exist")
    output = run.directory if options.output is None else Path(options.output)
    if options.source == "splitwise":
        return _whole_steps(run, folder, output)
    profiles = IMPORTERS[options.source](folder, options.chip)
    if options.complete is not None:
        other = load_profile(options.complete)
        profiles = [transfer.completed(one, other) if one.name == other.name else one for one in profiles]
    rows: list[dict[str, Any]] = []
    files: dict[str, int] = {}
    for profile in profiles:
        path = output / f"{profile.name}.json"
        profile.save(path)
        files[str(path)] = path.stat().st_size
        rows += _rows(profile)
    run.console.print(summary_table(rows, COLUMNS, title="errors on sizes left out of the fit"))
    run.log_table("held_out", rows)
    for path, size in files.items():
        run.console.print(f"{path} ({size / 1e3:.1f} kB)", soft_wrap=True, highlight=False)
    return {
        "files": files,
        "held_out": {profile.name: profile.held_out for profile in profiles},
        "sources": {profile.name: profile.source for profile in profiles},
        "licences": {profile.name: profile.licence for profile in profiles},
    }


def _from_aiconfigurator(folder: Path, chip: str | None) -> list[ChipProfile]:
    systems = {
        system: place
        for system, place in aiconfigurator.find_systems(folder).items()
        if chip in (None, aiconfigurator.SYSTEMS[system])
    }
    if not systems:
        raise ValueError(f"{folder} holds no tables of experiment.chip={chip}")
    return [
        aiconfigurator.fit_profile(aiconfigurator.read_tables(system, place))
        for system, place in systems.items()
    ]


def _from_llmservingsim(folder: Path, chip: str | None) -> list[ChipProfile]:
    """Of each card below ``folder``, all models and tensor-parallel degrees together; not of mixtures of experts, whose
    products have other shapes."""
    found: dict[str, list[Any]] = {}
    for place in llmservingsim.profile_folders(folder):
        shape = shape_named(llmservingsim.model_of(place))
        if shape.num_experts > 1:
            continue
        devices = int(place.name.removeprefix("tp")) if place.name.startswith("tp") else 1
        profile = llmservingsim.read_profile(place, devices)
        name = chip or chip_named(profile.chip)
        if name is None:
            raise ValueError(
                f"{place} is of {profile.chip!r}, of which conf/hardware has no sheet: give experiment.chip"
            )
        found.setdefault(name, []).append((profile, shape))
    if not found:
        raise ValueError(f"{folder} holds no operator profile: no folder with per_sequence.csv")
    return [transfer.chip_profile(parts, load_hardware(name)) for name, parts in found.items()]


def _from_vidur(folder: Path, chip: str | None) -> list[ChipProfile]:
    return [vidur.chip_profile(folder, load_hardware(chip or "a100"))]


IMPORTERS: dict[str, Callable[[Path, str | None], list[ChipProfile]]] = {
    "aiconfigurator": _from_aiconfigurator,
    "llmservingsim": _from_llmservingsim,
    "vidur": _from_vidur,
}


def _rows(profile: ChipProfile) -> list[dict[str, Any]]:
    return [
        {
            "chip": profile.name,
            "operator": name.replace("_", " "),
            "median_pct": 100.0 * error["median"],
            "p90_pct": 100.0 * error["p90"],
            "bias_pct": 100.0 * error["bias"],
            "num_points": int(error["num_points"]),
        }
        for name, error in profile.held_out.items()
    ]


def _whole_steps(run: Run, folder: Path, output: Path) -> dict[str, Any]:
    """Splitwise: a folder per cost model."""
    models = splitwise.read_cost_models(folder)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        model.save(output / name)
        spread = model.operators.dense.relative_std
        rows.append({"cost_model": name, "spread_pct": 100.0 * spread, "folder": str(output / name)})
    run.console.print(summary_table(rows, title="cost models of whole steps"))
    run.log_table("cost_models", rows)
    return {"cost_models": rows, "licence": splitwise.LICENCE}
