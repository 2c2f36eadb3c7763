"""What the experiments share: from a configuration to an engine, prompts and a traced run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.options import controller_options, policy_options
from specdec import plots
from specdec.config import Config
from specdec.perfetto import write_perfetto
from specdec.scheduler import SamplingParams
from specdec.trace import TraceWriter, read_requests, read_steps
from specdec.tracking import Run
from specdec.workload import PromptItem, prompt_items

if TYPE_CHECKING:
    from specdec import LLM, RequestOutput  # at run time only where needed: simulations do without torch


def build_llm(config: Config) -> LLM:
    """The configured model, decoding plainly; experiments choose drafters with :func:`configure`."""
    from specdec import LLM

    engine = config.engine
    llm = LLM(
        config.model.name,
        dtype=config.model.dtype,
        backend=config.model.backend,
        kv_dtype=config.model.kv_dtype,
        batch_invariant=config.model.batch_invariant,
        graphs=config.model.graphs,
        device=config.model.device,
        max_model_len=engine.max_model_len,
        num_blocks=engine.num_blocks,
        kv_memory_bytes=engine.kv_memory_mb * 2**20,
        block_size=engine.block_size,
        threads=engine.threads,
        quantization=config.model.quantization,
        group_size=config.model.group_size,
        max_num_seqs=engine.max_num_seqs,
    )
    return configure(llm, config)


def configure(
    llm: LLM, config: Config, drafter: Any = None, num_drafts: int | None = None, **options: Any
) -> LLM:
    """Set drafter and scheduler as configured; ``drafter`` and ``options`` go first."""
    engine, policy = config.engine, policy_options(config.policy)
    speculation = controller_options(config.speculation)
    k = speculation.pop("max_drafts", 0)
    chosen: dict[str, Any] = {
        "num_drafts": k if num_drafts is None else num_drafts,
        "speculation": speculation,
        "rule": config.verify.rule,
        **policy,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "prefix_caching": engine.prefix_caching,
        "watermark": engine.watermark,
        "num_swap_blocks": engine.num_swap_blocks,
        "num_scheduler_steps": engine.num_scheduler_steps,
        "overlap": engine.overlap,
        "seed": config.seed,
    }
    return llm.configure(drafter, **{**chosen, **options})


def drafter_options(config: Config, name: str | None = None) -> dict[str, Any]:
    """Options of the drafter called ``name``: the configured ones if it is the configured drafter."""
    own = {key: value for key, value in asdict(config.drafter).items() if value is not None and value != {}}
    return own if name in (None, own["name"]) else {"name": name}


def sampling_params(config: Config) -> SamplingParams:
    return SamplingParams(**asdict(config.sampling))


def prompts(config: Config) -> list[PromptItem]:
    workload = config.workload
    return prompt_items(workload.prompts, tasks=workload.tasks, num_prompts=workload.num_prompts)


@dataclass(frozen=True)
class Served:
    """One traced run of a list of prompts."""

    outputs: list[RequestOutput]
    steps: pl.DataFrame
    requests: pl.DataFrame
    seconds: float
    paths: list[Path]


def generate(
    llm: LLM, items: Sequence[PromptItem], params: SamplingParams, run: Run, name: str, **options: Any
) -> Served:
    """Serve ``items`` with a trace in ``trace/`` and a progress bar; ``options`` go to ``LLM.generate``."""
    folder = run.trace_directory
    prompts = [item.prompt for item in items]
    with progress(run) as bar, TraceWriter(folder, name) as trace:
        task = bar.add_task(name, total=len(items))
        start_s = time.perf_counter()
        outputs = llm.generate(
            prompts,
            params,
            tasks=[item.task for item in items],
            trace=trace,
            on_finish=lambda _: bar.advance(task),
            **options,
        )
        seconds = time.perf_counter() - start_s
    return Served(outputs, read_steps(folder, name), read_requests(folder, name), seconds, trace.paths)


def log_steps(run: Run, served: Served, name: str) -> None:
    """The run's Gantt chart, its Perfetto trace and its tables as an artifact."""
    run.log_figure("gantt", plots.step_gantt(served.steps))
    perfetto = run.trace_directory / f"{name}.perfetto.json"
    write_perfetto(served.steps, perfetto)
    run.log_trace([*served.paths, perfetto])


def progress(run: Run) -> Progress:
    """A progress bar that leaves nothing behind when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=run.console, transient=True)
