"""What readers of a step's results wait for can be done beside the next step's pass; the results are the same."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from specdec import LLM, SamplingParams
from specdec.trace import TraceWriter, read_requests, read_steps
from tests.engine.test_lossless import MERGED, tiny_prompts

LIMITS = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 3, "num_blocks": 14, "watermark": 0.0}
PARAMS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, seed=3),
    SamplingParams(max_tokens=15, stop=["e"]),
    SamplingParams(max_tokens=1),
]


def served(llm: LLM, folder: Path, overlap: bool, drafter) -> dict:
    llm.configure(drafter, overlap=overlap, **{key: LIMITS[key] for key in ("max_num_seqs", "watermark")})
    events, finished = [], []
    with TraceWriter(folder, f"overlap{overlap:d}") as trace:
        outputs = llm.generate(
            tiny_prompts(4),
            PARAMS,
            trace=trace,
            on_token=lambda event: events.append((event.request_id, tuple(event.token_ids), event.text)),
            on_finish=lambda output: finished.append(output.request_id),
        )
    first = outputs[0].request_id
    return {
        "outputs": [(out.token_ids, out.text, out.finish_reason, out.num_steps) for out in outputs],
        "events": [(request_id - first, *rest) for request_id, *rest in events],
        "finished": [request_id - first for request_id in finished],
        "steps": _untimed(read_steps(folder, f"overlap{overlap:d}"), first),
        "requests": _untimed(read_requests(folder, f"overlap{overlap:d}"), first),
    }


def _untimed(table: pl.DataFrame, first: int) -> list:
    kept = [name for name in table.columns if not name.endswith("_s") and name != "kept_ahead"]
    rows = table.select(kept).to_dicts()
    return [
        {
            key: [one - first for one in value] if key in ("request_ids", "admitted", "preempted") else value
            for key, value in row.items()
            if key != "request_id"
        }
        for row in rows
    ]


@pytest.mark.parametrize("drafter", [None, MERGED], ids=["plain", "merged"])
def test_overlap_changes_nothing_but_when_things_are_done(drafter, tiny_llama_dir: Path, tmp_path: Path):
    llm = LLM(str(tiny_llama_dir), **LIMITS)
    plain, overlapped = (served(llm, tmp_path, overlap, drafter) for overlap in (False, True))
    assert plain == overlapped
    assert len(plain["events"]) > 20 and sorted(plain["finished"]) == [0, 1, 2, 3]


def test_tokens_are_streamed_after_the_next_pass_has_begun(tiny_llama_dir: Path):
    llm = LLM(str(tiny_llama_dir), **LIMITS)
    orders = {}
    for overlap in (False, True):
        llm.configure(None, overlap=overlap, max_num_seqs=3)
        order: list[str] = []
        forward = llm.runner.forward

        def noted(*args, order=order, forward=forward, **options):
            order.append("pass")
            return forward(*args, **options)

        llm.runner.forward = noted
        try:
            llm.generate(
                tiny_prompts(1),
                SamplingParams(max_tokens=3, ignore_eos=True),
                on_token=lambda _, order=order: order.append("token"),
            )
        finally:
            llm.runner.forward = forward
        orders[overlap] = order
    assert orders[False] == ["pass", "token"] * 3
    assert orders[True] == ["pass", "pass", "token", "pass", "token", "token"]
