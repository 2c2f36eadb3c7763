"""Quantised weights over Triton's kernels, interpreted here: stored as codes, multiplied as codes, the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from specdec_kernels import tolerances
from specdec_kernels.fp8_matmul import triton as fp8
from specdec_kernels.wna16_matmul import triton as wna16
from torch import Tensor, nn

from specdec import LLM, SamplingParams
from specdec.drafter.draft_model import DraftModelDrafter
from specdec.rows import RowState, StepInput
from specdec.runner import EagerRunner
from tests.helpers.models import tiny_model_dir

PROMPTS = [[7, 8, 9, 7, 8], [13, 14]]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 16,
    "block_size": 8,
    "num_blocks": 8,
    "max_num_seqs": 2,
}
HALF: dict[str, Any] = LIMITS | {"dtype": "bfloat16"}
LINEARS = 4  # products of a layer: qkv, o, gate and up, down


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, whose inputs divide into groups, and biases."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    return tiny_model_dir("llama", tmp_path_factory.mktemp("grouped"), seed=3, **shape)


class Calls:
    """Of one function: rows of each call, and what its options said of batch invariance."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.batch_invariant: set[bool] = set()

    def check(self) -> None:
        """The prompts in one step, then a chain of drafts in at least one."""
        assert self.rows[:LINEARS] == [7] * LINEARS and len(self.rows) % LINEARS == 0
        assert max(self.rows[LINEARS:]) > len(PROMPTS)


@pytest.fixture
def record_calls(monkeypatch) -> Callable[[object, str], Calls]:
    """Lets a function of a module record the calls that later decoders make."""

    def record(module: object, name: str) -> Calls:
        calls, inner = Calls(), getattr(module, name)

        def recording(x: Tensor, *args, **options):
            calls.rows.append(len(x))
            calls.batch_invariant.add(options.get("batch_invariant", False))
            return inner(x, *args, **options)

        monkeypatch.setattr(module, name, recording)
        return calls

    return record


def tokens_of(llm: LLM, drafter=None) -> list[tuple[int, ...]]:
    llm.configure(drafter, num_drafts=3, max_num_seqs=2)
    return [tuple(out.token_ids) for out in llm.generate(PROMPTS, GREEDY)]


def bits_per_weight(llm: LLM) -> float:
    """Of what the layers store, biases left out."""
    runner, config = llm.runner, llm.runner.config
    assert isinstance(runner, EagerRunner)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    attention = config.hidden_size * dim * 2 * (heads + kv_heads)
    weights = attention + 3 * config.hidden_size * config.intermediate_size
    biases = dim * (heads + 2 * kv_heads) + config.hidden_size
    return 8 * (runner.decoder.linear_bytes / config.num_layers - 4 * biases) / weights


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("quantization", "group_size", "bits", "batch_invariant"),
    [("int4", 64, 4.5, True), ("int8", None, 9.0, False)],
)
def test_integer_weights_give_the_tokens_of_their_dequantised_copy(
    quantization, group_size, bits, batch_invariant, model_dir, record_calls
):
    stored = {"quantization": quantization, "group_size": group_size}
    expected = tokens_of(LLM(str(model_dir), backend="eager", **stored, **LIMITS))
    calls = record_calls(wna16, "wna16_matmul")
    how = {"backend": "triton", "graphs": "off", "batch_invariant": batch_invariant}
    llm = LLM(str(model_dir), **how, **stored, **LIMITS)
    assert tokens_of(llm, "ngram") == expected
    calls.check()
    assert calls.batch_invariant == {batch_invariant}
    assert bits_per_weight(llm) == bits  # 32 more of a scale and a minimum, for each group


@pytest.mark.gpu
def test_fp8_drafts_change_no_token(model_dir, record_calls):
    rounded, calls = record_calls(fp8, "quantize_fp8"), record_calls(fp8, "fp8_matmul")
    how = {"backend": "triton", "graphs": "off", "batch_invariant": True}
    llm = LLM(str(model_dir), quantization="fp8", **how, **LIMITS)
    plain = tokens_of(llm)
    assert tokens_of(llm, "ngram") == plain
    calls.check()
    assert calls.rows == rounded.rows and calls.batch_invariant == {True}
    assert 8.0 < bits_per_weight(llm) < 9.0
    assert tokens_of(LLM(str(model_dir), backend="eager", quantization="fp8", **LIMITS)) == plain


def _prompt(tokens: list[int]) -> StepInput:
    """A step that computes a prompt of T tokens whole, for logits [T, V]."""
    state, count = RowState(1, 16, 8), np.full(1, len(tokens), np.int32)
    state.tokens[0, : len(tokens)] = tokens
    table, start = np.arange(2, dtype=np.int32)[None], np.zeros(1, np.int32)
    return StepInput(state, table, 8, np.zeros(1, np.int64), start, count, count)


def _float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448.0
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _fp8_product(linear: nn.Linear, input: Tensor) -> Tensor:
    return nn.functional.linear(_float8(input), _float8(linear.weight), linear.bias)


@torch.inference_mode()
def _float64_logits(model_dir: Path, tokens: list[int]) -> Tensor:
    """Logits [T, V] of transformers' model in float64, its layers' products of float8 numbers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_fp8_product, module)
    return model(torch.tensor([tokens])).logits[0]


@pytest.mark.gpu
def test_fp8_logits_are_those_of_float64(model_dir):
    tokens = torch.randint(3, 300, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    expected, bound = _float64_logits(model_dir, tokens), tolerances.LOGITS[torch.float8_e4m3fn]
    llm = LLM(str(model_dir), backend="triton", quantization="fp8", graphs="off", **LIMITS)
    assert tolerances.scaled_error(llm.runner.forward(_prompt(tokens)).cpu().double(), expected) < bound
    original = LLM(
        str(model_dir), backend="eager", **LIMITS
    )  # float8 moves logits by far more than the bound
    assert (
        tolerances.scaled_error(original.runner.forward(_prompt(tokens)).cpu().double(), expected) > 5 * bound
    )


@pytest.mark.gpu
def test_a_draft_model_is_quantised_and_its_target_is_not(model_dir, record_calls):
    plain = tokens_of(LLM(str(model_dir), backend="eager", **LIMITS))
    calls = record_calls(wna16, "wna16_matmul")
    llm = LLM(str(model_dir), backend="triton", graphs="off", **LIMITS)
    drafter = {"name": "draft_model", "model": str(model_dir), "quantization": "int8"}
    assert tokens_of(llm, drafter) == plain
    assert calls.rows and bits_per_weight(llm) == 32.0


def test_a_draft_model_is_not_quantised_as_its_target_is(model_dir, record_calls):
    llm = LLM(str(model_dir), backend="triton", quantization="int4", **LIMITS)
    calls = record_calls(wna16, "wna16_matmul")
    llm.configure({"name": "draft_model", "model": str(model_dir)}, num_drafts=3)
    drafter = llm.engine.drafter
    assert isinstance(drafter, DraftModelDrafter)
    drafter.forward(_prompt([5, 6]))
    assert not calls.rows  # of the drafter: the target's decoder was made before


def test_what_cannot_be_combined_is_refused(model_dir):
    with pytest.raises(
        ValueError, match=r"'native' cannot run here.*no products in fp8; use backend='eager'"
    ):
        LLM(str(model_dir), backend="native", device="cpu", quantization="fp8", **HALF)
    with pytest.raises(ValueError, match="batch_invariant=True needs backend"):
        LLM(str(model_dir), backend="eager", quantization="fp8", batch_invariant=True, **LIMITS)
    with pytest.raises(ValueError, match="group_size=32: fp8 has one scale for each output channel"):
        LLM(str(model_dir), quantization="fp8", group_size=32, **LIMITS)
    with pytest.raises(ValueError, match=r"layers\.0\.q has 64 inputs.*group_size=128: use group_size=32"):
        LLM(str(model_dir), backend="triton", quantization="int8", group_size=128, **LIMITS)


def test_on_a_cpu_fp8_is_left_to_eager(model_dir):
    llm = LLM(str(model_dir), device="cpu", quantization="fp8", **HALF)
    assert llm.runner.backend == "eager" and bits_per_weight(llm) < 9.0
