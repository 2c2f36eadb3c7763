"""The entry point of every experiment: compose, validate, seed, stamp, run, track.

    python -m specdec.run                                        # lists the experiments
    python -m specdec.run +experiment=quickstart sampling.max_tokens=64
    python -m specdec.run --multirun +experiment=serve policy=static,continuous,chunked

A sweep that was stopped resumes when it is given the same ``hydra.sweep.dir``: runs whose ``summary.json`` says
"ok" for the same configuration are skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from specdec.config import VARIANTS, Config, validate
from specdec.tracking import start_run, write_json

log = logging.getLogger(__name__)


def conf_dir() -> Path:
    """The folder ``conf``: beside the package in a checkout, inside the installed package else."""
    beside = Path(__file__).resolve().parent.parent / "conf"
    return beside if beside.is_dir() else Path(__file__).resolve().parent / "conf"


def descriptions() -> dict[str, str]:
    """Each experiment's line: the first comment of its configuration that is not a Hydra directive."""
    lines: dict[str, str] = {}
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        lines[path.stem] = next((line for line in comments if not line.startswith("@package")), "")
    return lines


def help_text() -> str:
    known = descriptions()
    width = max(map(len, known))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in known.items())
    return (
        "usage: python -m specdec.run +experiment=NAME [key=value …]\n\n"
        f"experiments:\n{listed}\n\n"
        "examples:\n"
        "  python -m specdec.run +experiment=quickstart speculation.num_drafts=8\n"
        "  python -m specdec.run --multirun +experiment=serve policy=static,chunked\n"
        "  python -m specdec.run +experiment=quickstart --cfg job    # shows the configuration, runs nothing\n"
    )


def execute(config: Config, directory: Path, group: str | None) -> dict[str, Any]:
    """Run one validated experiment in ``directory``; its summary, which is also ``summary.json``."""
    plain = config.as_dict()
    fingerprint = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    done = _finished(directory, fingerprint)
    if done is not None:
        log.info("%s is finished already, skipped", directory)
        return done
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    name = config.experiment.name
    run = start_run(directory, plain, config.tracking, name, group)
    summary: dict[str, Any] = {"experiment": name, "config_hash": fingerprint, "status": "failed"}
    start_s = time.perf_counter()
    try:
        from specdec.stamp import stamp

        write_json(directory / "stamp.json", stamp())
        _seed(config.seed)
        summary |= import_module(f"experiments.{name}").run(config, run)
        summary["status"] = "ok"
    except BaseException as error:
        summary["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        summary["wall_s"] = time.perf_counter() - start_s
        run.finish(summary)
    run.console.print(f"[dim]results in[/dim] {directory}")
    return summary


def _finished(directory: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        summary = json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    same = summary.get("config_hash") == fingerprint and summary.get("status") == "ok"
    return summary if same else None


def _seed(seed: int) -> None:
    """Libraries that draw from global state; our own components have generators of their own."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def hydra_main(raw: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    group = None
    if hydra_config.mode == RunMode.MULTIRUN:
        group = Path(hydra_config.sweep.dir).name
    try:
        execute(validate(raw), Path(hydra_config.runtime.output_dir), group)
    except (ValueError, OSError) as error:
        log.debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def main() -> None:
    words = sys.argv[1:]
    if any(word.lstrip("+").startswith("experiment=") for word in words) or "--hydra-help" in words:
        # "experiment" is appended, so that a run without one is this module's help and not an error.
        sys.argv[1:] = [f"+{word}" if word.startswith("experiment=") else word for word in words]
        hydra_main()
        return
    print(help_text())
    unknown = [word for word in words if word not in ("-h", "--help")]
    if unknown:
        names = ", ".join(VARIANTS["experiment"])
        print(f"error: no experiment chosen: add +experiment=NAME, one of {names}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
