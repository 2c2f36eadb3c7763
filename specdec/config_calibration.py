"""Schemas of what brings measured timings in and checks predictions against recorded runs."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.config_schemas import check_choice, check_positive, require

TIMING_SOURCES = ("aiconfigurator", "llmservingsim", "splitwise", "vidur")
"""Formats of published timings that can be imported; a test holds them equal to the code's."""


@dataclass(frozen=True)
class ValidationGroup:
    """What ``+experiment=validate`` checks, one or several of these:

    run: folder of a recorded vLLM run (requests.jsonl, meta.json), with profile, the operator profile of the same
    model on the same card. num_blocks: KV blocks, null for what the run's meta.json says. model: the shape's name
    where the run's own is not known. silicon: a table of measured end-to-end rows in aiconfigurator's form
    (silicon_sample.csv). published: speed-ups of speculative decoding that were published for an A100.
    """

    run: str | None = None
    profile: str | None = None
    num_blocks: int | None = None
    model: str | None = None
    silicon: str | None = None
    published: bool = False

    def __post_init__(self) -> None:
        require(
            (self.run is None) == (self.profile is None),
            "validate.run and validate.profile come together: a recorded run and the operator profile of its card",
        )
        for name in ("num_blocks", "model"):
            require(
                getattr(self, name) is None or self.run is not None,
                f"validate.{name} was given, but it is for validate.run",
            )
        if self.num_blocks is not None:
            check_positive("validate.num_blocks", self.num_blocks)


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
