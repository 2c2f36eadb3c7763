"""Real open-loop runs of this engine on this machine, recorded one after the other; a stopped list of them goes on.

Each configuration (drafter, chunked prefill or not) is first saturated: all requests at once, which gives its
capacity. Then it serves Poisson arrivals at shares of that, and one run more, of other requests, to fit on. Answers
have drawn lengths and no end of their own. How fast the machine is, is measured before and after each run; one during
which that changed is measured again. Traces are ``trace/<run>.*.parquet``, and ``trace/<run>.json`` says that a run is
complete and what it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from experiments import common
from experiments.pace import measured_pace
from sim.recorded_run import Pace, RecordedRun
from specdec.config import Config, choose
from specdec.scheduler import SamplingParams, SchedulerConfig
from specdec.trace import TraceWriter, read_requests, read_steps
from specdec.tracking import Run, write_json
from specdec.workload import PromptItem, arrivals

if TYPE_CHECKING:
    from specdec import LLM

CAPACITY, FIT, REPEAT = "capacity", "fit", "repeat"
_LABELS = {"none": "plain", "ngram": "n-gram", "eagle": "EAGLE", "synthetic": "synthetic"}
_WARM_TOKENS = 6
_STEADY, _ATTEMPTS = 0.03, 4
"""A run at whose end the machine is faster or slower than at its start by more than this share is measured again."""
_GROUPS = ("model", "engine", "sampling", "speculation", "verify", "policy", "drafter", "workload", "seed")
_OPTIONS = ("num_requests", "output_lens", "chunk_tokens")
"""What one run depends on; the other options of ``validate`` say which runs are wanted and what is made of them."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A configuration of the engine.

    Attributes:
        drafter: its name, ``none`` for plain decoding.
        alpha: acceptance rate of a synthetic drafter.
        is_chunked: whether prompts are computed in chunks.
    """

    drafter: str
    alpha: float | None
    is_chunked: bool

    @property
    def slug(self) -> str:
        rate = "" if self.alpha is None else f"_{self.alpha:g}"
        return f"{self.drafter}{rate}_{'chunked' if self.is_chunked else 'whole'}"

    @property
    def label(self) -> str:
        rate = "" if self.alpha is None else f" α {self.alpha:g}"
        return f"{_LABELS[self.drafter]}{rate}, {'chunked' if self.is_chunked else 'whole prompts'}"

    @property
    def has_draft_model(self) -> bool:
        return self.drafter == "eagle"


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of a configuration.

    Attributes:
        capacity_per_s: requests per second where it is saturated.
        fitted: what is fitted on.
        predicted: by load.
        repeat: that of ``repeated_load`` once more, with the same requests at the same times.
    """

    setup: Setup
    capacity_per_s: float
    fitted: list[RecordedRun]
    predicted: dict[float, RecordedRun]
    repeat: RecordedRun | None = None
    repeated_load: float | None = None


def setups(config: Config) -> list[Setup]:
    """What is to be measured, in order."""
    options = config.validate
    found: list[Setup] = []
    for names, is_chunked in ((options.drafters, True), (options.whole_prompts, False)):
        for name in names:
            alphas = options.alphas if name == "synthetic" else [None]
            found += [Setup(name, alpha, is_chunked) for alpha in alphas]
    return found


def measure(config: Config, run: Run) -> list[Measured]:
    """All runs of all configurations; those that the directory holds already are read.

    Raises:
        ValueError: speculation of another kind than ``fixed``, drafters that have no drafts, or prompts that are all
            too long.
    """
    chosen = setups(config)
    if config.speculation.name != "fixed":
        raise ValueError(
            f"validate.own fits acceptance at one draft length, but speculation={config.speculation.name}: choose "
            "speculation=fixed"
        )
    if config.speculation.num_drafts < 1 and any(setup.drafter != "none" for setup in chosen):
        raise ValueError(
            "speculation.num_drafts=0 drafts nothing: raise it, or choose validate.drafters=[none] "
            "validate.whole_prompts=[none]"
        )
    recorder = _Recorder(config, run)
    near = min(config.validate.loads, key=lambda load: abs(load - 1.0))
    measured: list[Measured] = []
    num_runs = len(chosen) * (2 + len(config.validate.loads)) + 1
    bar = common.progress(run)
    bar.live.auto_refresh = False  # a thread that draws would take time from the engine
    with bar:
        task = bar.add_task("own engine", total=num_runs)

        def note(name: str) -> None:
            bar.update(task, description=name, advance=1)
            bar.refresh()

        recorder.note = note
        budget_s = config.validate.budget_s
        for setup in chosen:
            if measured and budget_s is not None and recorder.spent_s > budget_s:
                break
            measured.append(_measure_setup(recorder, setup, config, near if not measured else None))
    return measured


def _measure_setup(recorder: _Recorder, setup: Setup, config: Config, repeated: float | None) -> Measured:
    """The fit's run lies between those that are predicted, as machines drift."""
    loads = sorted(config.validate.loads)
    saturated = recorder.recorded(setup, CAPACITY, None)
    capacity_per_s = saturated_rate(saturated)
    middle = float(np.median(loads))
    predicted: dict[float, RecordedRun] = {}
    fitted = [saturated]
    repeat = None
    for place, load in enumerate(loads):
        predicted[load] = recorder.recorded(setup, f"load{load:g}", load * capacity_per_s)
        if place == 0:
            fitted.append(recorder.recorded(setup, FIT, middle * capacity_per_s))
        if load == repeated:
            repeat = recorder.recorded(setup, REPEAT, load * capacity_per_s, like=f"load{load:g}")
    return Measured(setup, capacity_per_s, fitted, predicted, repeat, repeated)


def saturated_rate(run: RecordedRun) -> float:
    """Requests per second while some wait: tokens over that time by the mean answer, prompts' share included."""
    steps, requests = run.steps, run.requests
    full = steps.filter(pl.col("num_waiting") > 0)
    if full.height < 10:
        full = steps
    seconds = float(full["end_s"].to_numpy()[-1] - full["start_s"].to_numpy()[0])
    tokens = float(full["num_emitted"].sum())
    return tokens / seconds / float(requests["num_generated"].to_numpy().mean())


class _Recorder:
    """Makes runs and keeps them on disk.

    Attributes:
        spent_s: what the runs took, those of an earlier process as well.
        note: called with the name of each run when it is there.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._folder = config, run.trace_directory
        self._hash = _fingerprint(config)
        self._ready: Setup | None = None
        self.spent_s = 0.0
        self.note: Callable[[str], None] = lambda _: None

    def recorded(
        self, setup: Setup, role: str, rate_per_s: float | None, like: str | None = None
    ) -> RecordedRun:
        """One run, read or made.

        Args:
            role: names the run within its configuration, and seeds its requests.
            rate_per_s: of arrivals; ``None`` for all at once.
            like: the role whose requests and times are to be used instead.
        """
        name = f"{setup.slug}_{role}"
        about = self._about(name)
        if about is None:
            for stale in self._folder.glob(f"{name}.*"):
                stale.unlink()
            self._make(setup, name, like or role, rate_per_s)
            about = self._about(name)
            assert about is not None
        self.spent_s += about["wall_s"]
        self.note(f"{setup.label}, {role}")
        return RecordedRun(
            read_steps(self._folder, name),
            read_requests(self._folder, name),
            SchedulerConfig(**about["limits"]),
            about["policy"],
            about["max_drafts"],
            Pace.mean([Pace(*pace) for pace in about["paces_s"]]),
        )

    def _about(self, name: str) -> dict[str, Any] | None:
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return None
        about = json.loads(path.read_text())
        return about if about["config_hash"] == self._hash and "paces_s" in about else None

    @cached_property
    def _llm(self) -> LLM:
        """Loaded when the first run is missing."""
        return common.build_llm(self._config)

    @cached_property
    def _pool(self) -> list[PromptItem]:
        items = common.prompts(self._config)
        lengths = [tokens.size for tokens in self._llm.encode([item.prompt for item in items])]
        room = self._llm.max_model_len - self._config.validate.output_lens[1]
        fitting = [item for item, length in zip(items, lengths, strict=True) if length <= room]
        if not fitting:
            raise ValueError(
                f"every prompt has more than {room} tokens, the room that max_model_len={self._llm.max_model_len} "
                f"leaves beside an answer of {self._config.validate.output_lens[1]}: raise engine.max_model_len"
            )
        return fitting

    def _make(self, setup: Setup, name: str, role: str, rate_per_s: float | None) -> None:
        config, options = self._config, self._config.validate
        seed = config.seed + int.from_bytes(hashlib.sha256(role.encode()).digest()[:3], "big")
        rng = np.random.default_rng(seed)
        count = options.num_requests
        items = [self._pool[index] for index in rng.integers(0, len(self._pool), count)]
        lengths = rng.integers(options.output_lens[0], options.output_lens[1] + 1, count)
        times_s = (
            np.zeros(count) if rate_per_s is None else arrivals("poisson", count, rng, rate_per_s=rate_per_s)
        )
        policy = self._configure(setup, seed)
        params = replace(common.sampling_params(config), ignore_eos=True)
        every = [replace(params, max_tokens=length) for length in lengths.tolist()]
        self._serve(items[: config.engine.max_num_seqs], [replace(params, max_tokens=_WARM_TOKENS)])
        # What a synthetic drafter must know of the answers is computed here and kept: the run's scheduler is fresh.
        self._llm._record_references(self._llm.encode([item.prompt for item in items]), every)
        self._configure(setup, seed)
        num_attempts = 0
        while True:
            num_attempts += 1
            paces = [measured_pace(self._llm)]
            with TraceWriter(self._folder, name) as trace:
                self._serve(items, every, times_s.tolist(), trace)
            paces.append(measured_pace(self._llm))
            change = max(abs(share - 1.0) for share in paces[1].over(paces[0]))
            if change <= _STEADY or num_attempts == _ATTEMPTS:
                break
            for stale in self._folder.glob(f"{name}.*"):
                stale.unlink()
            self._configure(setup, seed)
        loop = self._llm.engine.loop
        about = {
            "label": setup.label,
            "rate_per_s": rate_per_s,
            "seed": seed,
            "limits": _plain_limits(loop.config),
            "policy": policy,
            "max_drafts": loop.speculation.max_drafts,
            "paces_s": paces,
            "num_attempts": num_attempts,
            "wall_s": float(read_steps(self._folder, name)["end_s"].to_numpy()[-1]),
            "config_hash": self._hash,
        }
        write_json(self._folder / f"{name}.json", about)

    def _configure(self, setup: Setup, seed: int) -> dict[str, Any]:
        """A fresh scheduler and drafter; the policy."""
        config, options = self._config, self._config.validate
        policy = {"name": "chunked" if setup.is_chunked else "continuous"}
        common.configure(
            self._llm,
            config,
            _drafter(config, setup, seed),
            policy=policy,
            max_num_batched_tokens=options.chunk_tokens if setup.is_chunked else None,
            prefix_caching=False,  # lengths do not say what prompts share
            seed=seed,
        )
        return policy

    def _serve(
        self,
        items: list[PromptItem],
        params: list[SamplingParams],
        times_s: list[float] | None = None,
        trace: TraceWriter | None = None,
    ) -> None:
        every = params if len(params) == len(items) else params * len(items)
        tasks = [item.task for item in items]
        self._llm.generate(
            [item.prompt for item in items], every, arrivals_s=times_s, tasks=tasks, trace=trace
        )


def _drafter(config: Config, setup: Setup, seed: int) -> dict[str, Any] | None:
    """Its options: the configured ones if it is the configured drafter, else the defaults."""
    if setup.drafter == "none":
        return None
    is_configured = config.drafter.name == setup.drafter
    chosen = config.drafter if is_configured else choose("drafter", {"name": setup.drafter}, "drafter")
    options = {key: value for key, value in asdict(chosen).items() if value is not None}
    if setup.alpha is not None:
        options = {"name": setup.drafter, "alpha": setup.alpha, "seed": seed}
    return options


def _plain_limits(limits: SchedulerConfig) -> Mapping[str, Any]:
    """As JSON has them: without what no run changes and JSON cannot hold."""
    return {key: value for key, value in asdict(limits).items() if value != float("inf")}


def _fingerprint(config: Config) -> str:
    """Tells configurations apart by all that one run depends on."""
    every = config.as_dict()
    plain = {key: every[key] for key in _GROUPS} | {key: every["validate"][key] for key in _OPTIONS}
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
