"""Two published traps of controlling draft lengths, replayed in the simulator with the engine's own controllers.

**Acceptance** (vLLM pull request 26504; A40, a 4-bit copy of the 7B target drafts): acceptance stays at 0.86 to 0.91
from batch 1 to 32, while speculation goes from a gain to a loss; what follows acceptance drafts on. Here: an A100, an
8B target, its 4-bit copy as draft, 0.88 of the drafts right whatever the load.

**Count** (vLLM issue 49548): drafting by the number of running requests. Two ways in which it goes wrong here: the
same number with short contexts is bound by computing and with long ones by reading them; and a batch that grows past
the threshold becomes slow, so it stays above. The issue's further losses, shapes that are prepared anew whenever
drafting is switched, are of its engine: switching costs nothing in this simulator.

Users ask again as soon as they are answered. Counted are the steps in which the requests of all of them run: at the
end of a run, where fewer are left, drafting pays again.

>>> acceptance_trap(users=(1, 128))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from experiments import common
from experiments.simulations import with_step_times
from sim.cluster_spec import ClusterSpec, ReplicaSpec
from sim.cost_model import kv_blocks, roofline_cost_model
from sim.hardware import load_hardware
from sim.model_shape import MODEL_SHAPES, ModelShape
from sim.simulation import simulate
from specdec import plots, plots_drafts
from specdec.metrics import acceptance_rate, decode_rows
from specdec.report import summary_table
from specdec.scheduler import SchedulerConfig
from specdec.trace import read_steps
from specdec.tracking import Run
from specdec.workload import ClosedLoop, LognormalLengths

CHIP = "a100"
TARGET = MODEL_SHAPES["llama-3.1-8b"]
FOUR_BIT = replace(TARGET, name="llama-3.1-8b-4bit", weight_bytes_per_param=0.5)
OFF: dict[str, Any] = {"name": "off"}
FIXED: dict[str, Any] = {"name": "fixed", "max_drafts": 4}
USERS = (1, 8, 32, 64, 128)
THRESHOLD, CLIFF_USERS = 32, (16, 24, 32, 34, 48)
MANY = 128
COLUMNS = {
    "workload": "workload",
    "users": "users",
    "controller": "controller",
    "tok_per_s": "tok/s",
    "speedup": "× plain",
    "alpha": "acceptance",
    "drafts": "drafts per row",
}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A closed loop on one replica.

    Attributes:
        name: for tables.
        users: of whom each has one request under way.
        alpha: probability that a draft is right, given that those before it were.
        prompt_len, output_len: medians, tokens.
        draft: model on the target's chip; ``None`` drafts at no cost, as lookups do.
        requests_per_user: on average.
    """

    name: str
    users: int
    alpha: float
    prompt_len: int
    output_len: int
    draft: ModelShape | None = None
    requests_per_user: int = 4


def acceptance_trap(users: Sequence[int] = USERS) -> list[Row]:
    """A row for each number of users and controller: plain, fixed, led by acceptance, goodput."""
    controllers = {
        "off": OFF,
        "fixed 4": FIXED,
        "adaptive": {"name": "adaptive", "max_drafts": 8},
        "goodput": {"name": "goodput", "max_drafts": 8},
    }
    loads = (
        Traffic(name="chat", users=n, alpha=0.88, prompt_len=100, output_len=200, draft=FOUR_BIT)
        for n in users
    )
    return [row for load in loads for row in _serve(load, controllers)]


def context_trap() -> list[Row]:
    """The same number of users with short and with long contexts; a threshold must treat both alike."""
    controllers = {
        "off": OFF,
        "threshold above": _threshold(MANY),
        "threshold below": _threshold(MANY * 3 // 4),
        "goodput": {"name": "goodput", "max_drafts": 4},
    }
    loads = (
        Traffic(name="short contexts", users=MANY, alpha=0.6, prompt_len=128, output_len=256),
        Traffic(
            name="long contexts", users=MANY, alpha=0.6, prompt_len=2048, output_len=1024, requests_per_user=2
        ),
    )
    return [row for load in loads for row in _serve(load, controllers)]


def cliff_trap(users: Sequence[int] = CLIFF_USERS) -> list[Row]:
    """Numbers of users on both sides of a threshold, where drafting pays on both."""
    controllers = {
        "off": OFF,
        "fixed 4": FIXED,
        f"threshold {THRESHOLD}": _threshold(THRESHOLD),
        "goodput": {"name": "goodput", "max_drafts": 4},
    }
    loads = (
        Traffic(name="chat", users=n, alpha=0.7, prompt_len=128, output_len=256, requests_per_user=6)
        for n in users
    )
    return [row for load in loads for row in _serve(load, controllers)]


def acceptance_claims(rows: Sequence[Row]) -> dict[str, bool]:
    """What the trap says of the fewest and the most users of ``rows``, and whether it is so."""
    few, many = min(row["users"] for row in rows), max(row["users"] for row in rows)
    adaptive, goodput = (_by_users(rows, name) for name in ("adaptive", "goodput"))
    alphas = [row["alpha"] for row in adaptive.values()]
    drafts = adaptive[few]["drafts"], adaptive[many]["drafts"]
    return {
        "acceptance is within 0.03 at all loads": max(alphas) - min(alphas) <= 0.03,
        "speculation is a gain for few users and a loss for many": adaptive[few]["speedup"]
        > 1.0
        > adaptive[many]["speedup"],
        "control by acceptance drafts on into the loss": drafts[1] > 0.9 * drafts[0],
        "goodput drafts for few, hardly for many, and is never more than 2 % under plain": goodput[few][
            "drafts"
        ]
        > 1.0
        > 0.2
        > goodput[many]["drafts"]
        and min(row["speedup"] for row in goodput.values()) >= 0.98,
    }


def context_claims(rows: Sequence[Row]) -> dict[str, bool]:
    """Whether either threshold is wrong somewhere, and goodput nowhere."""
    at = {(row["workload"], row["controller"]): row["tok_per_s"] for row in rows}
    short, long = "short contexts", "long contexts"
    fixed = [name for name in dict.fromkeys(row["controller"] for row in rows) if name != "goodput"]
    return {
        "drafting at this number of users is a loss with short contexts": at[short, "threshold above"]
        < at[short, "off"],
        "and a gain with long ones": at[long, "threshold above"] > at[long, "off"],
        "where either threshold is wrong, goodput is at least a tenth faster": at[short, "goodput"]
        > 1.1 * at[short, "threshold above"]
        and at[long, "goodput"] > 1.1 * at[long, "threshold below"],
        "goodput is the fastest with both": all(
            at[name, "goodput"] >= max(at[name, other] for other in fixed) for name in (short, long)
        ),
    }


def cliff_claims(rows: Sequence[Row]) -> dict[str, bool]:
    """Whether throughput falls as users come, under the threshold alone, although drafting still pays."""
    tok_per_s = {
        name: {users: row["tok_per_s"] for users, row in _by_users(rows, name).items()}
        for name in ("off", "fixed 4", f"threshold {THRESHOLD}", "goodput")
    }
    threshold = tok_per_s[f"threshold {THRESHOLD}"]
    above = min(users for users in threshold if users > THRESHOLD)
    best = {users: max(tok_per_s["off"][users], tok_per_s["fixed 4"][users]) for users in threshold}
    return {
        "a few users more cost the threshold a third of its throughput": threshold[above]
        < 0.67 * threshold[THRESHOLD],
        "drafting would still pay there": tok_per_s["fixed 4"][above] > 1.5 * tok_per_s["off"][above],
        "goodput is within 3 % of the better of plain and fixed": all(
            value >= 0.97 * best[users] for users, value in tok_per_s["goodput"].items()
        ),
    }


def run_traps(run: Run) -> dict[str, Any]:
    """All of them, with tables and plots; rows and claims by trap."""
    traps = {
        "acceptance": (acceptance_trap, acceptance_claims),
        "contexts": (context_trap, context_claims),
        "cliff": (cliff_trap, cliff_claims),
    }
    found: dict[str, Any] = {}
    with common.progress(run) as bar:
        task = bar.add_task("traps", total=len(traps))
        for name, (trap, claims) in traps.items():
            rows = trap()
            found[name] = {"rows": rows, "claims": claims(rows)}
            bar.advance(task)
    for name, result in found.items():
        run.console.print(summary_table(result["rows"], COLUMNS, title=f"simulated on {CHIP}: {name}"))
        for claim, holds in result["claims"].items():
            run.console.print(f"  {'[green]yes' if holds else '[red]NO'}[/]  {claim}")
        run.log_table(f"trap_{name}", result["rows"])
    _plot(run, {name: result["rows"] for name, result in found.items()})
    return found


def _plot(run: Run, rows: dict[str, list[Row]]) -> None:
    by_load = plots_drafts.controllers_by_load
    run.log_figure(
        "trap_acceptance",
        by_load(
            pl.DataFrame(rows["acceptance"]),
            "users",
            "speedup",
            title="Acceptance stays, the gain does not",
            ylabel="speed-up over plain",
        ),
    )
    run.log_figure(
        "trap_cliff",
        by_load(
            pl.DataFrame(rows["cliff"]),
            "users",
            "tok_per_s",
            title=f"A threshold of {THRESHOLD} requests",
            ylabel="tokens/s",
        ),
    )
    bars: dict[str, dict[str, float]] = {}
    for row in rows["contexts"]:
        if row["controller"] != "off":
            bars.setdefault(row["controller"], {})[row["workload"]] = row["speedup"]
    run.log_figure("trap_contexts", plots.speedup_by_task(bars, title=f"{MANY} users, two context lengths"))


def _threshold(max_running: int) -> dict[str, Any]:
    return {"name": "load_threshold", "max_drafts": 4, "max_running": max_running}


def _by_users(rows: Sequence[Row], controller: str) -> dict[int, Row]:
    return {row["users"]: row for row in rows if row["controller"] == controller}


def _serve(load: Traffic, controllers: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """A row for each controller; the first one is plain decoding."""
    chip = load_hardware(CHIP)
    cost_model = roofline_cost_model(chip, TARGET, draft=load.draft)
    scheduler = SchedulerConfig(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        num_blocks=kv_blocks(chip, TARGET, 1, 16, 0.9, draft=load.draft),
        max_model_len=16_384,
    )
    source = ClosedLoop(
        load.users,
        0.0,
        LognormalLengths(
            prompt_median=load.prompt_len, prompt_sigma=0.3, output_median=load.output_len, output_sigma=0.3
        ),
        num_requests=max(16, load.requests_per_user * load.users),
        seed=0,
    )
    plain = 0.0
    for name, options in controllers.items():
        speculation = options
        if options["name"] == "goodput":
            speculation = with_step_times({"step_tokens": (), **options}, cost_model)
        replica = ReplicaSpec(
            scheduler,
            cost_model,
            speculation=speculation,
            acceptance={"name": "constant", "alpha": load.alpha},
        )
        with TemporaryDirectory() as folder:
            simulate(source, ClusterSpec.of(replica), seed=0, trace=Path(folder))
            steps = read_steps(Path(folder))
        steps = steps.filter(steps["num_rows"] == load.users)
        decoded = decode_rows(steps)
        rate = float(steps["num_emitted"].sum()) / float((steps["end_s"] - steps["start_s"]).sum())
        plain = plain or rate
        num_drafted = int(decoded["num_drafted"].sum())
        yield {
            "workload": load.name,
            "users": load.users,
            "controller": name,
            "tok_per_s": rate,
            "speedup": rate / plain,
            "alpha": acceptance_rate(decoded) if num_drafted else None,
            "drafts": num_drafted / decoded.height,
        }
