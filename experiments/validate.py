"""Are the predictions right? What was measured elsewhere, simulated and compared; ``report.md`` is the page to read.

python -m specdec.run +experiment=validate validate.run=BENCH_DIR validate.profile=PROFILE_DIR
python -m specdec.run +experiment=validate validate.silicon=silicon_sample.csv
python -m specdec.run +experiment=validate validate.published=true
python -m specdec.run +experiment=validate validate.own=true engine.max_num_seqs=8
"""

from __future__ import annotations

from typing import Any

from specdec.config import Config
from specdec.tracking import Run


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.validate
    summary: dict[str, Any] = {}
    sections: list[str] = []
    if options.run is not None:
        from experiments import validation_vllm

        found, section = validation_vllm.run(config, run)
        summary |= found
        sections.append(section)
    if options.silicon is not None:
        from experiments import validation_silicon

        found, section = validation_silicon.run(config, run)
        summary |= found
        sections.append(section)
    if options.published:
        from experiments import validation_published

        found, section = validation_published.run(config, run)
        summary |= found
        sections.append(section)
    if options.own:
        from experiments import validation_own

        found, section = validation_own.run(config, run)
        summary |= found
        sections.append(section)
    if not sections:
        raise ValueError(
            "nothing to validate: give validate.run with validate.profile, validate.silicon, validate.published=true "
            "or validate.own=true"
        )
    page = run.directory / "report.md"
    page.write_text("# Predictions against measurements\n\n" + "\n".join(sections))
    run.console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return summary
