"""How fast is this engine on this CPU, against others? Every engine in its own process, rounds interleaved.

Cases: N concurrent prompts of 64 tokens with 128 new ones, prefill of 512 tokens, n-gram lookup on a repetitive
prompt, the cost of one verification step by its tokens, and start-up. Ratios are medians over rounds in which the
engines took turns, so a machine that drifts moves both sides.

    python -m specdec.run +experiment=cpu_bench
    python -m specdec.run +experiment=cpu_bench experiment.peers=[] experiment.repeats=5
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments import common
from specdec import plots
from specdec.config import Config
from specdec.model.export import export_hf
from specdec.model.weights import load_model
from specdec.report import summary_table
from specdec.tracking import Run
from specdec.workload import PromptItem, builtin_prompts

PROMPT_LEN = 64
PREFILL_LEN = 512
# What this engine aims at, as ratios to transformers (and, for lookup, to itself without).
GOALS = {"1 concurrent": 2.5, "16 concurrent": 2.5, "64 concurrent": 2.4, f"prefill {PREFILL_LEN}": 1.9}
NEEDS = {"transformers": "transformers", "vllm": "vllm", "llama_cpp": "llama_cpp"}


class Worker:
    """A ``bench_worker`` process."""

    def __init__(self, peer: str, options: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "experiments.bench_worker", peer, json.dumps(options)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options["threads"]), **(environment or {})},
        )
        self.startup_s: float = self._read()["startup_s"]

    def ask(self, **case: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the benchmark process {self._process.args!r} ended: run it by hand to see why")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def _worker(
    peer: str, options: dict[str, Any], environment: dict[str, str] | None = None
) -> Iterator[Worker]:
    worker = Worker(peer, options, environment)
    try:
        yield worker
    finally:
        worker.close()


def run(config: Config, run: Run) -> dict[str, Any]:
    options = config.experiment
    peers = [name for name in options.peers if importlib.util.find_spec(NEEDS[name])]
    for name in options.peers:
        if name not in peers:
            run.console.print(f"[dim]{name} is not installed, left out[/dim]")
    cases = _cases(config)
    summary: dict[str, Any] = {"startup_s": _startup(config, run) if options.startup else {}}
    with ExitStack() as stack:
        settings = _settings(config, stack)
        workers = {name: stack.enter_context(_worker(name, settings)) for name in ("specdec", *peers)}
        seconds = _rounds(run, workers, cases, options.repeats)
        summary["verify_step_ms"] = _verify_steps(workers["specdec"], options)
        summary["peak_rss_mb"] = {
            name: worker.ask(prompts=[[5]], new_tokens=1)["peak_rss_mb"] for name, worker in workers.items()
        }
    rows = _rows(cases, seconds)
    summary["cases"] = rows
    _show(run, rows, summary)
    run.log_table("cases", rows)
    against = {
        row["case"]: row["vs_transformers"]
        for row in rows
        if row["vs_transformers"] and row["engine"] == "specdec"
    }
    if against:
        figure = plots.ratio_bars(against, GOALS, title="Speed over transformers, same weights and threads")
        run.log_figure("over_transformers", figure)
    run.log_metrics({f"{row['case']}/{row['engine']}": row["tok_s"] for row in rows})
    return summary


def _settings(config: Config, stack: ExitStack) -> dict[str, Any]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    loaded = load_model(config.model.name, dtype=getattr(torch, config.model.dtype))
    export_hf(loaded, folder)
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "backend": config.model.backend,
        "threads": config.experiment.threads,
        "max_model_len": 1024,
        "kv_memory_bytes": config.engine.kv_memory_mb * 2**20,
        "directory": str(folder),
        "gguf": str(loaded.path or ""),
    }


def _cases(config: Config) -> list[dict[str, Any]]:
    """Each case: a name, what to ask of every engine, and how this one also answers with n-gram lookup."""
    tokenizer = load_model(config.model.name, dtype=torch.bfloat16).tokenizer

    def encode(item: PromptItem) -> list[int]:
        assert not isinstance(item.prompt, str)
        return tokenizer.apply_chat_template(item.prompt)

    ids = [encode(item) for item in builtin_prompts()]
    text = [token for one in sorted(ids, key=len, reverse=True) for token in one]
    repetitive = encode(builtin_prompts(["repetitive"])[0])
    options = config.experiment
    cases: list[dict[str, Any]] = []
    for count in options.concurrency:
        prompts = [(text[17 * i :] + text)[:PROMPT_LEN] for i in range(count)]
        cases.append({"name": f"{count} concurrent", "prompts": prompts, "new_tokens": options.new_tokens})
    cases.append({"name": f"prefill {PREFILL_LEN}", "prompts": [(text * 4)[:PREFILL_LEN]], "new_tokens": 1})
    lookup = {"drafter": {"name": "ngram"}, "num_drafts": options.num_drafts}
    for count in (1, 16):
        cases.append(
            {
                "name": f"repetitive × {count}",
                "prompts": [repetitive] * count,
                "new_tokens": options.new_tokens,
                "lookup": lookup,
            }
        )
    return cases


def _rounds(
    run: Run, workers: dict[str, Worker], cases: list[dict[str, Any]], repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds by case and engine; the first round only warms up."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with common.progress(run) as bar, (run.directory / "rounds.jsonl").open("w") as results:
        task = bar.add_task("rounds", total=(repeats + 1) * len(cases))
        for repeat in range(repeats + 1):
            for case in cases:
                ask = {"prompts": case["prompts"], "new_tokens": case["new_tokens"]}
                turns: list[tuple[str, Worker, dict[str, Any]]] = [
                    (name, worker, {"drafter": None, "num_drafts": 0} if name == "specdec" else {})
                    for name, worker in workers.items()
                ]
                if "lookup" in case:
                    turns.append(("specdec + ngram", workers["specdec"], case["lookup"]))
                answers = {name: worker.ask(**ask, **extra) for name, worker, extra in turns}
                if "lookup" in case:
                    assert answers["specdec + ngram"]["outputs"] == answers["specdec"]["outputs"], (
                        "outputs differ"
                    )
                for name, answer in answers.items():
                    record = {
                        "round": repeat,
                        "case": case["name"],
                        "engine": name,
                        "seconds": answer["seconds"],
                    }
                    results.write(json.dumps(record) + "\n")
                    if repeat:
                        seconds.setdefault((case["name"], name), []).append(answer["seconds"])
                results.flush()
                bar.advance(task)
    return seconds


def _verify_steps(worker: Worker, options: Any) -> dict[str, float]:
    """Median milliseconds of a step over so many tokens of one request, after 128 tokens of context."""
    return {
        str(count): 1e3 * worker.ask(verify_tokens=count, context=128, repeats=30)["seconds"]
        for count in options.verify_tokens
    }


def _startup(config: Config, run: Run) -> dict[str, float]:
    """Seconds from process start to the first token: with an empty cache of compiled code, and with a warm one."""
    with ExitStack() as stack:
        settings = _settings(config, stack)
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        times: dict[str, float] = {}
        for label, environment in (("compiling", {"SPECDEC_NATIVE_CACHE": cache}), ("warm", {})):
            with _worker("specdec", settings, environment) as worker:
                times[label] = worker.startup_s
    run.console.print(
        f"start-up: {', '.join(f'{label} {seconds:.1f} s' for label, seconds in times.items())}"
    )
    return times


def _rows(cases: list[dict[str, Any]], seconds: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    sizes = {case["name"]: case for case in cases}
    for (name, engine), times in seconds.items():
        case = sizes[name]
        prefill = name.startswith("prefill")
        tokens = PREFILL_LEN if prefill else len(case["prompts"]) * case["new_tokens"]
        ratios = {
            f"vs_{peer}": statistics.median(b / a for a, b in zip(times, seconds[name, peer], strict=True))
            for peer in ("transformers", "specdec")
            if (name, peer) in seconds and peer != engine
        }
        rows.append(
            {
                "case": name,
                "engine": engine,
                "tok_s": tokens / statistics.median(times),
                "min_tok_s": tokens / max(times),
                "max_tok_s": tokens / min(times),
                "vs_transformers": ratios.get("vs_transformers"),
                "vs_specdec": ratios.get("vs_specdec"),
            }
        )
    return rows


def _show(run: Run, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    columns = {
        "case": "case",
        "engine": "engine",
        "tok_s": "tok/s",
        "min_tok_s": "slowest",
        "max_tok_s": "fastest",
        "vs_transformers": "÷ transformers",
        "vs_specdec": "÷ specdec plain",
    }
    run.console.print(summary_table(rows, columns, title="tokens per second, median over interleaved rounds"))
    steps = summary["verify_step_ms"]
    base = next(iter(steps.values()))
    shown = ", ".join(f"{count}: {ms:.1f} ms ({ms / base:.2f}×)" for count, ms in steps.items())
    run.console.print(f"verification step by tokens: {shown}")
    memory = ", ".join(f"{name} {mb:.0f} MB" for name, mb in summary["peak_rss_mb"].items())
    run.console.print(f"peak memory: {memory}")
