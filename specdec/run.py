"""The entry point of every experiment: compose, validate, seed, stamp, run, track.

    python -m specdec.run                                        # lists the experiments
    python -m specdec.run +experiment=quickstart sampling.max_tokens=64
    python -m specdec.run --multirun +experiment=serve policy=static,continuous,chunked

A sweep that was stopped resumes when it is given the same ``hydra.sweep.dir``: runs whose ``summary.json``
says "ok" for the same configuration are skipped. What the user got wrong is one line on stderr and exit
status 1; ``run.log`` has the traceback.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import sys
import time
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specdec.config import VARIANTS, Config, register, validate
from specdec.names import unknown_name
from specdec.stamp import stamp
from specdec.tracking import environment, start_run, write_json

log = logging.getLogger("specdec.run")  # under "python -m" this module's __name__ is __main__


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
        "  python -m specdec.run +experiment=quickstart --cfg job   # shows the configuration, runs nothing\n"
    )


def execute(config: Config, directory: Path, group: str | None) -> dict[str, Any]:
    """Run one validated experiment in ``directory``; its summary, which is also ``summary.json``.

    Whatever the experiment raises is raised again, after a summary that says so.
    """
    plain = config.as_dict()
    fingerprint = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    done = _finished(directory, fingerprint)
    if done is not None:
        log.warning("%s is finished already, skipped", directory)
        return done
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    source = stamp()
    write_json(directory / "stamp.json", source)
    name = config.experiment.name
    log.info("%s, configuration %s, git %s", name, fingerprint, source["git"]["revision"])
    run = start_run(directory, {**plain, "stamp": source}, config.tracking, name, group)
    summary: dict[str, Any] = {"experiment": name, "config_hash": fingerprint, "status": "failed"}
    start_s = time.perf_counter()
    try:
        _seed(config.seed)
        summary |= import_module(f"experiments.{name}").run(config, run)
        summary["status"] = "ok"
    except BaseException as error:
        summary["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        summary["wall_s"] = time.perf_counter() - start_s
        run.finish(summary)
        log.info("%s after %.1f s", summary["status"], summary["wall_s"])
    run.console.print(f"[dim]results in[/dim] {directory}", soft_wrap=True, highlight=False)
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


class Reported(Exception):
    """An error that the user was told of; the other runs of the sweep go on."""


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def hydra_main(raw: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    group = Path(hydra_config.sweep.dir).name if sweeping else None
    try:
        execute(validate(raw), Path(hydra_config.runtime.output_dir), group)
    except (ValueError, OSError) as error:
        log.debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise Reported if sweeping else SystemExit(1) from None
    except Exception:
        log.debug("failed", exc_info=True)
        raise


def main() -> None:
    words = sys.argv[1:]
    if any(word.lstrip("+").startswith("experiment=") for word in words) or "--hydra-help" in words:
        # "experiment" is appended, so that a run without one is this module's help and not an error.
        sys.argv[1:] = [f"+{word}" if word.startswith("experiment=") else word for word in words]
        register()
        _run_hydra()
        return
    print(help_text())
    unknown = [word for word in words if word not in ("-h", "--help")]
    if unknown:
        names = ", ".join(VARIANTS["experiment"])
        print(f"error: no experiment chosen: add +experiment=NAME, one of {names}", file=sys.stderr)
        raise SystemExit(1)


def _run_hydra() -> None:
    """Hydra's main, with what it says about a wrong override in one line."""
    try:
        with environment(HYDRA_FULL_ERROR="1"):  # Hydra raises, instead of printing several lines
            hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except Reported:
        raise SystemExit(1) from None


def explain(error: Exception) -> str:
    """One line for an error of composition: the key, what is wrong with it, and the nearest right ones."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(unknown_name(group, name, error.options))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    key = getattr(cause, "full_key", None)
    refused = re.match(r"Could not (?:override|delete|append)[^']*'([^']+)'", str(error))
    if refused:
        schema = getattr(cause, "object_type", None)
        prefix = (key or "").rpartition(".")[0]
        known = [item.name for item in fields(schema if is_dataclass(schema) else Config)]
        return str(unknown_name("key", key or refused[1], [f"{prefix}.{name}".lstrip(".") for name in known]))
    message = str(cause or error).strip().splitlines()[0]
    return f"{key}: {message}" if key else " ".join(str(error).split())


if __name__ == "__main__":
    main()
