"""Is the output the target's own? A certificate for a model, a drafter, a rule and a temperature.

Greedy: speculative outputs against plain ones, and how close the target's two best tokens were where they first
differ. Sampled: each emitted token's place in the target's own law, token by token, must be uniform.

python -m specdec.run +experiment=lossless
python -m specdec.run +experiment=lossless drafter=recycling speculation.num_drafts=16 experiment.temperature=0.8
python -m specdec.run +experiment=lossless model.dtype=float32 drafter=layer_skip verify.rule=block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments import common
from specdec import plots_lossless
from specdec.config import Config
from specdec.report import summary_table
from specdec.scheduler import SamplingParams
from specdec.tracking import Run

if TYPE_CHECKING:
    from specdec import LLM

NUM_BINS = 20
FloatArray = NDArray[np.float64]


def run(config: Config, run: Run) -> dict[str, Any]:
    options, params = config.experiment, common.sampling_params(config)
    if options.num_samples and (params.repetition_penalty != 1.0 or params.presence_penalty != 0.0):
        raise ValueError(
            "the sampled part knows no penalties: set sampling.repetition_penalty=1 and sampling.presence_penalty=0, "
            "or experiment.num_samples=0"
        )
    if config.drafter.name == "none" or config.speculation.name == "off":
        raise ValueError(
            "nothing is drafted, so there is nothing to certify: choose a drafter and a speculation"
        )
    llm = common.build_llm(config)
    greedy = _greedy(config, run, llm)
    sampled = _sampled(config, run, llm) if options.num_samples else None
    holds = greedy["num_equal"] == greedy["num_prompts"] or not greedy["is_exact"]
    if sampled is not None:
        holds &= sampled["p_value"] >= options.significance and sampled["num_impossible"] == 0
    summary = {"holds": bool(holds), "greedy": greedy, "sampled": sampled, "backend": llm.runner.backend}
    (run.directory / "certificate.md").write_text(_page(config, summary))
    run.console.print(
        f"[bold]{'lossless' if holds else 'NOT lossless'}[/], see {run.directory / 'certificate.md'}"
    )
    run.log_metrics({"holds": float(holds), "greedy_equal": greedy["num_equal"] / greedy["num_prompts"]})
    return summary


def _drafting(llm: LLM, config: Config) -> None:
    common.configure(llm, config, common.drafter_options(config))


def _greedy(config: Config, run: Run, llm: LLM) -> dict[str, Any]:
    """Plain against speculative greedy outputs of the configured prompts."""
    items = common.prompts(config)
    params = replace(common.sampling_params(config), temperature=0.0, ignore_eos=True)
    plain = common.generate(common.configure(llm, config), items, params, run, "plain")
    _drafting(llm, config)
    served = common.generate(llm, items, params, run, "greedy")
    differences: list[dict[str, Any]] = []
    for expected, got in zip(plain.outputs, served.outputs, strict=True):
        if expected.token_ids == got.token_ids:
            continue
        pairs = zip(expected.token_ids, got.token_ids, strict=False)
        position = next(i for i, (one, other) in enumerate(pairs) if one != other)
        prompt = np.array(expected.prompt_token_ids, np.int32)
        logits = next(llm.continuation_logits(prompt, [expected.token_ids[:position]]))[-1]
        best = logits.topk(2).values
        differences.append(
            {"prompt": expected.request_id, "position": position, "margin": float(best[0] - best[1])}
        )
    if differences:
        run.console.print(summary_table(differences, title="greedy outputs that differ; margin in logits"))
        run.log_table("differences", differences)
    return {
        "num_prompts": len(items),
        "num_equal": len(items) - len(differences),
        "differences": differences,
        # In other number formats a batch of another shape may round another way, and then ties fall differently.
        "is_exact": config.model.dtype == "float32" or llm.runner.backend == "native",
        "tau": _tau(served.outputs),
    }


def _sampled(config: Config, run: Run, llm: LLM) -> dict[str, Any]:
    """Places of sampled tokens in the target's laws."""
    options = config.experiment
    params = replace(
        common.sampling_params(config),
        temperature=options.temperature,
        max_tokens=options.num_tokens,
        ignore_eos=True,
    )
    prompts = llm.encode([item.prompt for item in common.prompts(config)[: options.num_sampled_prompts]])
    _drafting(llm, config)
    rng = np.random.default_rng(config.seed)
    shape = (len(prompts), options.num_samples, options.num_tokens)
    places, hotter = np.zeros(shape), np.zeros(shape)
    num_impossible, outputs = 0, []
    with common.progress(run) as bar:
        task = bar.add_task("sampling", total=len(prompts) * options.num_samples)
        for number, prompt in enumerate(prompts):
            seeds = [config.seed + number * options.num_samples + i for i in range(options.num_samples)]
            found = llm.generate(
                [prompt.tolist()] * len(seeds), [replace(params, seed=seed) for seed in seeds]
            )
            outputs += found
            laws = llm.continuation_logits(prompt, [out.token_ids[:-1] for out in found])
            for index, (out, logits) in enumerate(zip(found, laws, strict=True)):
                noise = rng.random(options.num_tokens)
                law = _law(logits, params)
                places[number, index] = _places(law, out.token_ids, noise)
                num_impossible += int((law[np.arange(len(law)), out.token_ids] == 0.0).sum())
                warmer = replace(params, temperature=params.temperature * options.control)
                hotter[number, index] = _places(_law(logits, warmer), out.token_ids, noise)
                bar.advance(task)
    rows = [
        {
            "token": position + 1,
            "p_value": _p_value(places[..., position]),
            "control_p_value": _p_value(hotter[..., position]),
        }
        for position in range(options.num_tokens)
    ]
    run.console.print(
        summary_table(rows, title=f"uniform places in the target's law, T={options.temperature:g}")
    )
    run.log_table("positions", rows)
    run.log_figure("places", plots_lossless.places(places.reshape(-1, options.num_tokens), NUM_BINS))
    return {
        "positions": rows,
        # Bonferroni: the smallest of n p-values, n times.
        "p_value": min(1.0, min(row["p_value"] for row in rows) * len(rows)),
        "control_p_value": min(1.0, min(row["control_p_value"] for row in rows) * len(rows)),
        "num_impossible": num_impossible,
        "num_samples": places.shape[0] * places.shape[1],
        "tau": _tau(outputs),
    }


def _law(logits: Any, params: SamplingParams) -> FloatArray:
    """What is sampled from, float64 [n, V]."""
    from specdec.sampling import process_logits

    every = np.ones(len(logits), np.float32)
    law = process_logits(
        logits,
        params.temperature * every,
        top_k=(params.top_k * every).astype(np.int32),
        top_p=params.top_p * every,
        min_p=params.min_p * every,
    )
    return law.double().numpy(force=True)


def _places(law: FloatArray, tokens: Sequence[int], noise: FloatArray) -> FloatArray:
    """Where in [0, 1) each token falls when the law is laid out from its most to its least likely token.

    A token's interval is as long as its probability, and ``noise`` [n] spreads the token evenly over it. So the
    places are uniform and independent exactly if token i was drawn from ``law[i]`` given those before it (Rosenblatt
    1952, "Remarks on a multivariate transformation"); a bias towards likely tokens moves them to the left.
    """
    rows, index = np.arange(len(law)), np.asarray(tokens)
    own = law[rows, index][:, None]
    before = (law > own) | ((law == own) & (np.arange(law.shape[1]) < index[:, None]))
    return (law * before).sum(axis=1) + noise * own[:, 0]


def _p_value(places: FloatArray) -> float:
    """Of a chi-square test that these are uniform, in NUM_BINS bins."""
    counts, _ = np.histogram(places, bins=NUM_BINS, range=(0.0, 1.0))
    return float(stats.chisquare(counts).pvalue)


def _tau(outputs: Sequence[Any]) -> float:
    """Tokens per verification, those of prompts aside."""
    steps = sum(out.num_steps - 1 for out in outputs)
    return sum(len(out.token_ids) - 1 for out in outputs) / steps if steps else float("nan")


def _page(config: Config, summary: dict[str, Any]) -> str:
    greedy, sampled, options = summary["greedy"], summary["sampled"], config.experiment
    k = getattr(config.speculation, "num_drafts", 0)
    lines = [
        f"# {'Lossless' if summary['holds'] else 'Not lossless'}: {config.drafter.name} drafts for {config.model.name}",
        "",
        f"{config.model.dtype}, backend {summary['backend']}, up to {k} drafts a step, rule {config.verify.rule}, "
        f"{config.engine.max_num_seqs} requests at once, seed {config.seed}.",
        "",
        "## Greedy",
        "",
        f"{greedy['num_equal']} of {greedy['num_prompts']} outputs equal plain decoding token for token "
        f"(τ = {greedy['tau']:.2f}). "
        + (
            "They must all be equal: here the shape of a batch never decides between two tokens."
            if greedy["is_exact"]
            else "In this number format a batch of another shape may round another way: a difference is a tie."
        ),
        "",
    ]
    lines += [
        f"* prompt {row['prompt']}, token {row['position'] + 1}: the two best logits are {row['margin']:.4g} apart"
        for row in greedy["differences"]
    ]
    if sampled is not None:
        lines += [
            "",
            f"## Sampled, temperature {options.temperature:g}",
            "",
            f"{sampled['num_samples']} samples of {options.num_tokens} tokens (τ = {sampled['tau']:.2f}); "
            f"{sampled['num_impossible']} tokens that the target gives no probability. Each token's place in the "
            "target's law given the tokens before it must be uniform:",
            "",
            "| token | p-value | p-value of the control |",
            "|---:|---:|---:|",
        ]
        lines += [
            f"| {row['token']} | {row['p_value']:.3g} | {row['control_p_value']:.3g} |"
            for row in sampled["positions"]
        ]
        lines += [
            "",
            f"Over all positions p = {sampled['p_value']:.3g} (Bonferroni), to be at least "
            f"{options.significance:g}. The control asks the same of a law {options.control:g} times as hot: p = "
            f"{sampled['control_p_value']:.3g} says how well this many samples tell the two apart.",
        ]
    return "\n".join([*lines, ""])
