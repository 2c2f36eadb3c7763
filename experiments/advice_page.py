"""The answer of ``advise`` as a page of markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sim.speculative_step import EAGLE, LOOKUP


def page(summary: Mapping[str, Any], options: Any) -> str:
    """One page.

    Args:
        summary: of ``advise``.
        options: its configuration.
    """
    best = summary["best"]
    where = f"{summary['model']} on {summary['tensor_parallel']} × {summary['chip']}"
    if options.num_replicas > 1:
        where += f", {options.num_replicas} replicas"
    lines = [
        f"# Speculate? {_answer(best)}",
        "",
        f"{where}, {options.rate_per_s:g} requests/s, {_asked(options)}. Timings: {summary['timings']}.",
        "",
        *_findings(summary),
        "",
        "## Check it on the hardware",
        "",
        "```",
        summary["command"],
        "```",
        "",
        "It measures plain decoding and this draft length at the batch that the load leads to.",
        "",
        "## What this rests on",
        "",
        *(f"* {each}" for each in summary["assumptions"]),
        "",
    ]
    return "\n".join(lines)


def _answer(best: Mapping[str, Any]) -> str:
    what = f"{best['with']}, {_length(best)}"
    if best["verdict"] == "yes":
        return f"Yes: {what}"
    if best["verdict"] == "no":
        return f"No: the best there is, {what}, gives {_number(best['gain'])} ×"
    if best["verdict"] == "overloaded":
        return "Neither serves this load: add replicas first"
    return f"Perhaps ({what}): measure first, the interval includes a loss"


def _length(best: Mapping[str, Any]) -> str:
    if best["depth"] < best["num_drafts"]:
        return f"a tree of {best['num_drafts']} nodes, {best['depth']} deep"
    return f"k = {best['num_drafts']}"


def _asked(options: Any) -> str:
    if options.lengths == "fixed":
        return f"{options.prompt_len} prompt and {options.output_len} output tokens"
    tasks = ", ".join(f"{task} {share:g}" for task, share in options.tasks.items())
    return f"Azure's {options.lengths} lengths" + (f" ({tasks})" if tasks else "")


def _findings(summary: Mapping[str, Any]) -> list[str]:
    best, plain, fast = summary["best"], summary["plain"], summary["speculative"]
    ends = f"{_number(best['gain_low'])} to {_number(best['gain_high'])} (90 % of what is possible)"
    lines = [
        f"* **Gain at this load**: {_number(best['gain'])} × in time per output token, {ends}: from "
        f"{_ms(plain['tpot_s'])} with {_number(plain['batch'])} requests at once to {_ms(fast['tpot_s'])} with "
        f"{_number(fast['batch'])}.",
        f"* **Turns into a loss**: {_loss(best)}",
        f"* **Load within the SLO** (mean latencies): {_number(best['slo_capacity_plain_per_s'])} requests/s a replica "
        f"without, {_number(best['slo_capacity_per_s'])} with.",
        f"* **Acceptance**: {best['acceptance']}; {best['tau']:.2f} tokens per step.",
    ]
    simulated = best["simulated"]
    if simulated.get("gain"):
        before, after = simulated["plain"], simulated["speculative"]
        lines.append(
            f"* **Simulated** ({simulated['num_requests']:,} requests, the engine's scheduler): "
            f"{simulated['gain']:.2f} × in mean time per token, p99 {_ms(before['tpot_p99_s'])} → "
            f"{_ms(after['tpot_p99_s'])}, p99 to the first token {_ms(before['ttft_p99_s'])} → "
            f"{_ms(after['ttft_p99_s'])}."
        )
    elif "reason" in simulated:
        lines.append(f"* Not simulated: {simulated['reason']}.")
    return lines


def _loss(best: Mapping[str, Any]) -> str:
    even = best["break_even_per_s"]
    if even == 0.0:
        return "at every load."
    low = best["break_even_low_per_s"]
    open_end = math.isinf(even) and low >= best["plain_capacity_per_s"]
    spread = "" if low == even or open_end else f", perhaps from {_number(low)}"
    if math.isinf(even):
        full = _number(best["plain_capacity_per_s"])
        return f"not up to {full} requests/s a replica, where plain decoding is full{spread}."
    return f"from {_number(even)} requests/s a replica{spread}."


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return "∞" if not math.isfinite(seconds) else f"{1e3 * seconds:.3g} ms"


_HUB = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "smollm2-135m": "smollm2-135m",
}


def command(options: Any, draft: str, num_drafts: int, batch: float) -> str:
    """What measures the gain at the batch that this load leads to, on the hardware itself."""
    rows = max(1, round(min(batch, options.max_num_seqs)))
    drafters = {LOOKUP: "drafter=ngram", EAGLE: "drafter=eagle drafter.path=FOLDER_OF_THE_HEAD"}
    drafter = drafters.get(draft) or f"drafter=draft_model drafter.model={_HUB[draft]}"
    return (
        f"python -m specdec.run +experiment=control model.name={_HUB[options.model]} {drafter} "
        f"experiment.batches=[{rows}] experiment.fixed=[{num_drafts}] experiment.traps=false"
    )
