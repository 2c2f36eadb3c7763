"""What a user may ask for, and what is refused with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specdec.scheduler import Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
    ],
)
def test_sampling_params_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* is not allowed: it must be"):
        SamplingParams(**{field: value})  # pyright: ignore


def test_a_single_stop_string_is_a_tuple_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # pyright: ignore
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop == ("a", "b")  # pyright: ignore


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams().is_greedy and not SamplingParams(temperature=0.5).is_greedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_id": -1}, "request_id=-1 must be >= 0"),
        ({"prompt_len": 0}, "request 0 has an empty prompt: give at least one token"),
        ({"max_tokens": 0}, "request 0: max_tokens=0 must be >= 1"),
    ],
)
def test_requests_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"request_id": 0, "prompt_len": 1, "max_tokens": 1, **changes})


def test_known_tokens_are_prompt_and_output() -> None:
    request = Request(request_id=0, prompt_len=5, max_tokens=9)
    request.num_generated = 3
    assert request.num_known == 8


def test_the_scheduler_imports_nothing_heavier_than_numpy() -> None:
    code = (
        "import sys, specdec.scheduler; print([m for m in ('torch', 'polars', 'scipy') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
