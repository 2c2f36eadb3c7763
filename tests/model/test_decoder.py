"""Our decoder against transformers, for every family, on random models in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.model.decoder import Decoder
from specdec.model.weights import LoadedModel, load_model
from tests.helpers.models import FAMILIES, VOCAB_SIZE, tiny_model_dir
from tests.helpers.paged import PagedRun

LENGTHS = (45, 1, 23, 40)
TOLERANCE = 1e-4


@dataclass
class Pair:
    """A transformers model, ours, some sequences and the former's logits [length, V] of each."""

    reference: Any
    model: LoadedModel
    sequences: list[list[int]]
    expected: list[Tensor]

    def decoder(self) -> Decoder:
        return Decoder(self.model.config, self.model.weights, torch.float32, "cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import AutoModelForCausalLM

    path = tiny_model_dir(request.param, tmp_path_factory.mktemp(request.param), seed=3)
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    noise = torch.Generator().manual_seed(1)
    sequences = [torch.randint(VOCAB_SIZE, (length,), generator=noise).tolist() for length in LENGTHS]
    with torch.inference_mode():
        expected = [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]
    assert min(logits.std() for logits in expected) > 0.3, "weights too small to tell models apart"
    return Pair(reference, load_model(path, dtype=torch.float32), sequences, expected)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= TOLERANCE


def test_prefill(pair: Pair) -> None:
    run = PagedRun(pair.decoder(), len(LENGTHS), max(LENGTHS))
    for actual, expected in zip(run.step(dict(enumerate(pair.sequences))), pair.expected, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("chunk", [5, 37])
def test_chunked_prefill(pair: Pair, chunk: int) -> None:
    run = PagedRun(pair.decoder(), len(LENGTHS), max(LENGTHS), block_size=8)
    for start in range(0, max(LENGTHS), chunk):
        pieces = {row: tokens[start : start + chunk] for row, tokens in enumerate(pair.sequences)}
        pieces = {row: tokens for row, tokens in pieces.items() if tokens}
        for row, actual in zip(pieces, run.step(pieces), strict=True):
            assert_close(actual, pair.expected[row][start : start + chunk])


def test_cached_decode_beside_prefill(pair: Pair) -> None:
    """Row 0 decodes a token a step, row 2 three (a draft check), row 3 joins late with its whole prompt."""
    run = PagedRun(pair.decoder(), len(LENGTHS), max(LENGTHS))
    first, second, late = (pair.sequences[row] for row in (0, 2, 3))
    run.step({2: second[:2], 0: first[:30]})
    for step in range(7):
        new = {0: [first[30 + step]], 2: second[2 + 3 * step : 5 + 3 * step]}
        if step == 3:
            new[3] = late
        outputs = run.step(new)
        assert_close(outputs[0], pair.expected[0][30 + step : 31 + step])
        assert_close(outputs[1], pair.expected[2][2 + 3 * step : 5 + 3 * step])
        if step == 3:
            assert_close(outputs[2], pair.expected[3])


def test_rejected_tokens_leave_no_trace(pair: Pair) -> None:
    run = PagedRun(pair.decoder(), 1, max(LENGTHS))
    tokens = pair.sequences[0]
    run.step({0: tokens[:20]})
    run.step({0: [7, 7, 7, 7]})
    run.lengths[0] = 20
    assert_close(run.step({0: tokens[20:22]})[0], pair.expected[0][20:22])


def test_layer_subset_equals_a_model_of_those_layers(pair: Pair) -> None:
    kept = [0, 3]
    run = PagedRun(pair.decoder(), 1, max(LENGTHS))
    tokens = pair.sequences[0]
    actual = run.step({0: tokens}, layers=kept)[0]
    inner = pair.reference.model
    layers, types = inner.layers, getattr(inner.config, "layer_types", None)
    try:
        inner.layers = torch.nn.ModuleList([layers[index] for index in kept])
        inner.config.num_hidden_layers = len(kept)
        if types is not None:
            inner.config.layer_types = [types[index] for index in kept]
        with torch.inference_mode():
            expected = pair.reference(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        inner.layers, inner.config.num_hidden_layers = layers, len(layers)
        if types is not None:
            inner.config.layer_types = types
    assert_close(actual, expected)


def test_bfloat16_is_near_float32(pair: Pair) -> None:
    decoder = Decoder(pair.model.config, pair.model.weights, torch.bfloat16, "cpu")
    actual = PagedRun(decoder, 1, max(LENGTHS)).step({0: pair.sequences[0]})[0]
    assert actual.dtype == torch.float32
    assert (actual - pair.expected[0]).abs().mean() < 0.1
