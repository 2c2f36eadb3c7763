"""Schemas of what brings measured timings in and checks predictions against recorded runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from specdec.config_schemas import check_choice, check_positive, check_rate, require

TIMING_SOURCES = ("aiconfigurator", "llmservingsim", "splitwise", "vidur")
"""Formats of published timings that can be imported; a test holds them equal to the code's."""


OWN_DRAFTERS = ("none", "ngram", "eagle", "synthetic")
"""Drafters of the runs of our own engine; ``none`` is plain decoding."""
_OWN_OPTIONS = (
    *("drafters", "whole_prompts", "alphas", "loads", "num_requests", "output_lens", "chunk_tokens"),
    *("num_simulations", "budget_s"),
)


@dataclass(frozen=True)
class ValidationGroup:
    """What ``+experiment=validate`` checks, one or several of these:

    run: folder of a recorded vLLM run (requests.jsonl, meta.json), with profile, the operator profile of the same
    model on the same card. num_blocks: KV blocks, null for what the run's meta.json says. model: the shape's name
    where the run's own is not known. workload: the file that the run was fed with (JSON lines with input_tok_ids),
    which tells what prompts have in common; null for what is known of the run's dataset_hash. silicon: a table of
    measured end-to-end rows in aiconfigurator's form (silicon_sample.csv). published: speed-ups of speculative decoding
    that were published for an A100.

    own: runs of this engine on this machine, some to fit on, others to predict. Its options: drafters, of
    ``OWN_DRAFTERS``, with chunked prefill; whole_prompts, those that run with prompts computed whole as well; alphas,
    acceptance rates of synthetic. Other options of a drafter are those of its group, if it is the chosen one. loads:
    rates of arrivals in shares of the measured capacity. num_requests of each run, output_lens the shortest and the
    longest answer, chunk_tokens the token budget of a step with chunked prefill. num_simulations: of each predicted
    run, with luck of their own. budget_s: no configuration is begun after so many seconds of measuring, null for no
    limit.
    """

    run: str | None = None
    profile: str | None = None
    num_blocks: int | None = None
    model: str | None = None
    workload: str | None = None
    silicon: str | None = None
    published: bool = False
    own: bool = False
    drafters: list[str] = field(default_factory=lambda: list(OWN_DRAFTERS))
    whole_prompts: list[str] = field(default_factory=lambda: ["none", "ngram"])
    alphas: list[float] = field(default_factory=lambda: [0.6, 0.8])
    loads: list[float] = field(default_factory=lambda: [0.5, 0.9, 1.3])
    num_requests: int = 100
    output_lens: list[int] = field(default_factory=lambda: [16, 48])
    chunk_tokens: int = 128
    num_simulations: int = 16
    budget_s: float | None = None

    def __post_init__(self) -> None:
        require(
            (self.run is None) == (self.profile is None),
            "validate.run and validate.profile come together: a recorded run and the operator profile of its card",
        )
        for name in ("num_blocks", "model", "workload"):
            require(
                getattr(self, name) is None or self.run is not None,
                f"validate.{name} was given, but it is for validate.run",
            )
        if self.num_blocks is not None:
            check_positive("validate.num_blocks", self.num_blocks)
        self._check_own()

    def _check_own(self) -> None:
        for item in fields(self):
            if item.name in _OWN_OPTIONS and not self.own:
                default = item.default_factory() if callable(item.default_factory) else item.default
                given = getattr(self, item.name)
                require(
                    given == default,
                    f"validate.{item.name}={given} was given, but it is for validate.own=true: add that",
                )
        for name in ("drafters", "whole_prompts"):
            chosen = getattr(self, name)
            for drafter in chosen:
                check_choice(f"validate.{name}", drafter, OWN_DRAFTERS)
            require(len(set(chosen)) == len(chosen), f"validate.{name}={chosen} names a drafter twice")
        require(
            bool(self.drafters or self.whole_prompts),
            f"validate.drafters and validate.whole_prompts are empty: name some of {', '.join(OWN_DRAFTERS)}",
        )
        for name in ("loads", "alphas"):
            values = getattr(self, name)
            require(len(values) > 0, f"validate.{name} is empty: give at least one")
            require(len(set(values)) == len(values), f"validate.{name}={values} names a value twice")
        for load in self.loads:
            check_positive("validate.loads", load)
        for alpha in self.alphas:
            check_rate("validate.alphas", alpha)
        require(
            len(self.output_lens) == 2 and 2 <= self.output_lens[0] <= self.output_lens[1],
            f"validate.output_lens={self.output_lens} must be the shortest and the longest answer, each >= 2 tokens",
        )
        require(
            self.num_requests >= 4,
            f"validate.num_requests={self.num_requests} must be >= 4: percentiles need several requests",
        )
        for name in ("chunk_tokens", "num_simulations"):
            require(getattr(self, name) >= 1, f"validate.{name}={getattr(self, name)} must be >= 1")
        if self.budget_s is not None:
            check_positive("validate.budget_s", self.budget_s)


@dataclass(frozen=True)
class ValidateConfig:
    """What is checked stands in the group ``validate``."""

    name: str = "validate"


@dataclass(frozen=True)
class ImportTimingsConfig:
    """source: format of the published timings in the folder path. output: where the fitted profile goes, null for
    the run's own folder. chip: only the timings of this one, a name in conf/hardware, or for a format that does not
    name its chip, the chip; null for all that are there. complete: another profile of a chip, whose timings fill in
    what this source lacks."""

    name: str = "import_timings"
    source: str = "aiconfigurator"
    path: str | None = None
    output: str | None = None
    chip: str | None = None
    complete: str | None = None

    def __post_init__(self) -> None:
        check_choice("experiment.source", self.source, TIMING_SOURCES)
