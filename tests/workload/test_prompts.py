"""Prompts load, or fail by line number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.workload import (
    TASKS,
    Requests,
    builtin_prompts,
    choose,
    load_prompts,
    prompt_items,
    prompt_token_ids,
    synthetic_prompts,
)

GOOD = '{"question_id": 1, "category": "writing", "turns": ["Say hello.", "Again."], "reference": ["Hi.", "Hi!"]}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_builtin_prompts_cover_the_six_kinds():
    items = builtin_prompts()
    counts = Counter(item.task for item in items)
    assert tuple(counts) == TASKS
    assert min(counts.values()) >= 6
    texts = [item.prompt[0]["content"] for item in items]
    assert len(set(texts)) == len(texts)
    assert all(item.prompt[0]["role"] == "user" for item in items)


@pytest.mark.parametrize("task", ["summarise", "rewrite"])
def test_prompts_to_copy_from_have_a_passage(task: str):
    for item in builtin_prompts([task]):
        assert len(item.prompt[0]["content"]) > 700


def test_repetitive_prompts_on_request_only():
    assert {item.task for item in builtin_prompts(["repetitive"])} == {"repetitive"}
    assert {item.task for item in prompt_items(tasks=["repetitive", "code"])} == {"repetitive", "code"}


def test_num_prompts_is_even_over_tasks():
    assert Counter(item.task for item in prompt_items(num_prompts=12)) == dict.fromkeys(TASKS, 2)
    assert Counter(item.task for item in prompt_items(num_prompts=7)) == dict.fromkeys(TASKS, 1) | {"chat": 2}
    assert [item.task for item in builtin_prompts(["code", "chat"], per_task=1)] == ["chat", "code"]


@given(st.lists(st.sampled_from(TASKS), min_size=1, max_size=4, unique=True), st.integers(1, 40))
def test_choose_is_balanced(tasks: list[str], num_prompts: int):
    items = builtin_prompts()
    chosen = choose(items, tasks=tasks, num_prompts=num_prompts)
    available = Counter(item.task for item in items if item.task in tasks)
    assert len(chosen) == min(num_prompts, available.total())
    counts = Counter(item.task for item in chosen)
    most = max(counts.values())
    assert all(counts[task] >= min(most - 1, available[task]) for task in tasks)


def test_choose_bad_input():
    with pytest.raises(ValueError, match="did you mean summarise"):
        builtin_prompts(["sumarise"])
    with pytest.raises(ValueError, match="num_prompts=0"):
        prompt_items(num_prompts=0)
    with pytest.raises(ValueError, match="tasks is empty"):
        prompt_items(tasks=[])


def test_spec_bench_lines(tmp_path: Path):
    rag = '{"category": "rag", "turns": ["Who?"], "reference": [["A", "B"]]}'
    other = '{"category": "poetry", "turns": ["Rhyme."]}'
    items = load_prompts(write(tmp_path / "question.jsonl", GOOD, "", rag, other))
    assert [item.prompt for item in items] == [
        [{"role": "user", "content": text}] for text in ("Say hello.", "Who?", "Rhyme.")
    ]
    assert [item.task for item in items] == ["chat", "rag", "poetry"]
    assert [item.category for item in items] == ["writing", "rag", "poetry"]
    assert [item.reference for item in items] == ["Hi.", "A", None]


def test_simple_lines(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    lines = (json.dumps({"prompt": "Once upon a time", "task": "story"}), json.dumps({"prompt": messages}))
    path = write(tmp_path / "prompts.jsonl", *lines)
    assert [item.prompt for item in load_prompts(path, chat=False)] == ["Once upon a time", messages]
    assert [item.task for item in prompt_items(path)] == ["story", "unknown"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["cut off', "line 3: Unterminated string"),
        ("[1, 2]", "line 3: expected a JSON object, got list"),
        ('{"category": "qa"}', r"line 3: neither 'turns' \(Spec-Bench\) nor 'prompt'"),
        ('{"turns": []}', "line 3: 'turns' must be a list of at least one text"),
        ('{"turns": "text"}', "line 3: 'turns' must be a list"),
        ('{"turns": [" "]}', "line 3: the prompt is empty"),
        ('{"prompt": ""}', "line 3: the prompt is empty"),
        ('{"prompt": 5}', "line 3: the prompt must be a text or a list of chat messages, got 5"),
        ('{"prompt": [{"role": "user"}]}', "line 3: a chat message needs the texts 'role' and 'content'"),
        ('{"prompt": [{"role": "user", "content": ""}]}', "line 3: the prompt is empty"),
        ('{"prompt": "x", "task": 3}', "line 3: 'task' must be a text, got 3"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "broken.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=rf"broken\.jsonl, {message}"):
        load_prompts(path)


def test_bytes_that_are_not_text_are_named(tmp_path: Path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: .*utf-8"):
        load_prompts(path)


def test_files_without_prompts(tmp_path: Path):
    with pytest.raises(ValueError, match=r"empty\.jsonl has no prompts"):
        load_prompts(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "missing.jsonl")


def test_synthetic_prompts():
    prompts = synthetic_prompts(3, 63, 17, np.random.default_rng(0))
    assert [len(prompt) for prompt in prompts] == [63] * 3
    assert {token for prompt in prompts for token in prompt} <= set(range(17))
    assert prompts == synthetic_prompts(3, 63, 17, np.random.default_rng(0))
    with pytest.raises(ValueError, match="length=0"):
        synthetic_prompts(1, 0, 17, np.random.default_rng(0))


def test_prompts_share_what_their_hashes_say():
    # Blocks of 4 tokens: requests 0 and 1 share two blocks, request 2 shares one; the third of 0 is no full block.
    hashes = [11, 12, 11, 12, 13, 11, 99]
    requests = Requests.build(
        [0.0] * 3, [11, 13, 8], 1, hash_block_size=4, hash_start=[0, 2, 5, 7], hashes=hashes
    )
    prompts = [prompt_token_ids(requests, index, 1000) for index in range(3)]
    assert [len(prompt) for prompt in prompts] == [11, 13, 8]
    assert prompts[0][:8] == prompts[1][:8] and prompts[0][8:] != prompts[1][8:11]
    assert prompts[0][:4] == prompts[2][:4] and prompts[0][4:8] != prompts[2][4:8]
    assert {token for prompt in prompts for token in prompt} <= set(range(1000))
    assert prompt_token_ids(requests, 0, 1000) == prompts[0] != prompt_token_ids(requests, 0, 1000, seed=1)


def test_prompts_of_requests_without_hashes():
    requests = Requests.build([0.0, 1.0], 63, 1)
    first, second = (prompt_token_ids(requests, index, 50) for index in range(2))
    assert len(first) == 63 and first != second
    with pytest.raises(ValueError, match="vocab_size=0"):
        prompt_token_ids(requests, 0, 0)
