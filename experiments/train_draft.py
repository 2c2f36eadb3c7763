"""Train a draft head or a student on the target's own answers, and measure it on held-out prompts.

The target answers prompts, and the steps that make an answer also give what a head learns from it: hidden states and
likely next tokens. Then the head is trained against the target's distribution, within one time budget for both. Answers
are written as they come and the training state every so often, so a run that was interrupted goes on: give it the same
``experiment.work``. At the end the engine decodes held-out prompts plainly and with the new drafter.

    python -m specdec.run +experiment=train_draft
    python -m specdec.run +experiment=train_draft experiment.kind=student experiment.prompts=[builtin,more.jsonl]
    python -m specdec.run +experiment=quickstart drafter=eagle drafter.path=runs/…/head experiment.drafters=[eagle]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import common
from experiments.draft_training import (
    Budget,
    collect,
    command,
    coverage,
    first_answers,
    fit,
    flat,
    layers_of,
    make_learner,
    plan_recipe,
    save_learner,
    training_items,
)
from specdec import plots
from specdec.config import Config
from specdec.config_training import TrainDraftConfig
from specdec.heads.borrowed import Borrowed, frequent_tokens
from specdec.llm import LLM
from specdec.metrics import acceptance_by_position, decode_rows, tokens_per_step
from specdec.plots_training import learning_curve
from specdec.report import summary_table
from specdec.tracking import Run
from specdec.training.batches import Batches
from specdec.training.corpus import Corpus
from specdec.training.learners import acceptance
from specdec.training.teacher import Teacher
from specdec.training.trainer import Trainer
from specdec.workload import PromptItem

COLUMNS = {
    "mode": "decoding",
    "tau": "τ",
    "tok_s": "tok/s",
    "speedup": "speed-up",
    "draft_ms": "draft ms",
    "verify_ms": "verify ms",
    "equal": "equal",
}


def run(config: Config, run: Run) -> dict[str, Any]:
    options: TrainDraftConfig = config.experiment
    if config.engine.prefix_caching:
        raise ValueError(
            "engine.prefix_caching=true: cached tokens would have no hidden states, set it to false"
        )
    work = Path(options.work) if options.work else run.directory / "work"
    output = Path(options.output) if options.output else run.directory / "head"
    llm = common.build_llm(config)
    if options.max_len > llm.max_model_len:
        raise ValueError(
            f"experiment.max_len={options.max_len} exceeds the engine's max_model_len={llm.max_model_len}"
        )
    model, target = llm.runner.model, llm.runner.config
    layers, top_k = layers_of(options, target, work / "corpus"), min(options.top_k, target.vocab_size)
    corpus = Corpus(work / "corpus", layers, target.hidden_size, top_k, options.cache_mb << 20, model.source)
    teacher = Teacher(llm.runner, llm.num_blocks, llm.block_size, layers, top_k)
    budget, checkpoint = Budget(work / "budget.json", options.budget_s), work / "state.safetensors"
    # A corpus that has begun keeps its prompts, and with them what is held out.
    items = [] if options.text else training_items(config, run, llm, work, budget, may_ask=not len(corpus))
    speeds = {} if checkpoint.exists() else collect(config, run, llm, corpus, teacher, budget, items)

    train, held = (
        [i for i, answer in enumerate(corpus.answers) if answer.held_out == part] for part in (False, True)
    )
    written = [corpus.answers[i].tokens[corpus.answers[i].num_prompt :] for i in train]
    vocabulary = frequent_tokens(written, min(options.vocabulary, target.vocab_size), target.eos_token_ids)
    borrowed = Borrowed(model, vocabulary)
    batches = Batches(corpus, train, borrowed.places, teacher, options.tokens_per_step)
    held_out = Batches(corpus, held, borrowed.places, teacher, options.tokens_per_step)
    learner = make_learner(options, model, borrowed, corpus, train, teacher, config.seed)
    recipe = plan_recipe(options, learner, batches, budget, checkpoint, config.seed)
    trainer = Trainer(learner, batches, recipe, checkpoint)
    quick = Batches(corpus, first_answers(corpus, held), borrowed.places, teacher, options.tokens_per_step)
    fit(run, options, trainer, quick, budget)

    progress = trainer.progress
    speeds |= {
        "train_tok_s": progress.tokens / max(progress.seconds, 1e-9),
        "load_share": progress.load_seconds / max(progress.seconds, 1e-9),
    }
    about = {
        "command": command(options, config.seed),
        "data": {
            "answers": len(train),
            "answer_tokens": sum(map(len, written)),
            "held_out_answers": len(held),
            "held_out_coverage": coverage(corpus, held, borrowed),
        },
        "training": {"steps": progress.step, "tokens_seen": progress.tokens, "autocast": recipe.autocast},
        "acceptance": asdict(acceptance(learner, held_out, options.num_drafts)),
    }
    drafter = save_learner(output, learner, borrowed, model, about)
    run.log_figure(
        "learning_curve", learning_curve(progress.curve, title=f"{options.kind}, held-out answers")
    )
    run.log_table("learning_curve", [flat(point) for point in progress.curve])
    asked = (
        [items[int(corpus.answers[i].key.partition("/")[0])] for i in held]
        if items
        else common.prompts(config)
    )
    corpus.close()
    rows = measure(config, run, llm, drafter, asked[: options.eval_prompts])
    return {"head": str(output), **about, "speeds": speeds, "engine": {row["mode"]: row for row in rows}}


def measure(
    config: Config, run: Run, llm: LLM, drafter: dict[str, Any], items: Sequence[PromptItem]
) -> list[dict[str, Any]]:
    """Real runs of the engine, one request at a time: plain, chains and, where there are any, trees."""
    k, params = config.experiment.num_drafts, common.sampling_params(config)
    modes: dict[str, dict[str, Any] | None] = {"plain": None, "chain": drafter}
    if drafter["name"] == "eagle":
        modes["tree"] = {**drafter, "shape": "tree"}
    if drafter["name"] == "medusa":
        modes = {"plain": None, "tree": drafter}
    served: dict[str, common.Served] = {}
    for name, spec in modes.items():
        num_drafts = 2 * k if name == "tree" else k
        speculation = {"name": "fixed", "max_drafts": num_drafts}
        common.configure(llm, config, spec, num_drafts, speculation=speculation, max_num_seqs=1)
        served[name] = common.generate(llm, items, params, run, name)
    rows = [_row(name, served) for name in modes]
    run.console.print(
        summary_table(rows, COLUMNS, title=f"{config.experiment.kind}: held-out prompts, one at a time")
    )
    run.log_table("engine", rows)
    positions = {
        name: acceptance_by_position(decode_rows(one.steps))
        for name, one in served.items()
        if name != "plain"
    }
    run.log_figure("acceptance_by_position", plots.acceptance_by_position(positions))
    run.log_metrics({f"{row['mode']}/{key}": row[key] for row in rows for key in ("tau", "tok_s", "speedup")})
    return rows


def _row(name: str, served: dict[str, common.Served]) -> dict[str, Any]:
    one, plain = served[name], served["plain"]
    rows = decode_rows(one.steps)
    tokens, plain_tokens = (sum(len(out.token_ids) for out in run.outputs) for run in (one, plain))
    equal = sum(
        ours.token_ids == theirs.token_ids for ours, theirs in zip(one.outputs, plain.outputs, strict=True)
    )
    drafting = one.steps.filter(one.steps["draft_s"] > 0)
    return {
        "mode": name,
        "tau": tokens_per_step(rows),
        "tok_s": tokens / one.seconds,
        "speedup": (tokens / one.seconds) / (plain_tokens / plain.seconds),
        "draft_ms": 1e3 * statistics.median(drafting["draft_s"]) if drafting.height else 0.0,
        "verify_ms": 1e3 * statistics.median(one.steps["verify_s"]),
        "equal": f"{equal}/{len(one.outputs)}",
    }
