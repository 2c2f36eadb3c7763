"""The C++ inputs of a draft head against the formulas in plain torch, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from specdec_kernels.cpu_decoder import is_available
from specdec_kernels.cpu_decoder.layers import CpuHeadInputs
from specdec_kernels.tolerances import LOGITS, scaled_error
from torch import Tensor

from tests.kernels.native import ACTIVATION_DTYPE, FLAVOURS

AVAILABLE, REASON = is_available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"native decoder: {REASON}")
EPS = 1e-5
SIZE, VOCAB = 96, 50


def make_front(num_layers: int, fused: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {
        "mix": normal(SIZE, 2 * SIZE) / SIZE**0.5,
        "embed": normal(VOCAB, SIZE).to(torch.bfloat16),
        "feature_scale": 1.0 + 0.1 * normal(num_layers, SIZE),
        "feature_shift": 0.1 * normal(num_layers, SIZE),
        "unknown": normal(SIZE),
        "embed_norm": 1.0 + 0.1 * normal(SIZE),
        "feature_norm": 1.0 + 0.1 * normal(SIZE),
    }
    if fused:
        weights["fuse"] = normal(SIZE, num_layers * SIZE) / (num_layers * SIZE) ** 0.5
    return {
        name: weight.to(torch.bfloat16).float() if name in ("mix", "fuse") else weight
        for name, weight in weights.items()
    }


def expected(weights: dict[str, Tensor], token_ids: np.ndarray, features: Tensor) -> Tensor:
    w = {name: weight.double() for name, weight in weights.items()}
    embedded = F.rms_norm(w["embed"][torch.from_numpy(token_ids)], (SIZE,), w["embed_norm"], EPS)
    return F.linear(
        torch.cat([embedded, F.rms_norm(features, (SIZE,), w["feature_norm"], EPS)], -1), w["mix"]
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("num_layers", "fused"), [(3, True), (1, True), (1, False)])
@pytest.mark.parametrize("count", [1, 2, 17, 70])
def test_inputs_are_the_formulas(count: int, num_layers: int, fused: bool, flavour: str) -> None:
    weights = make_front(num_layers, fused)
    generator = torch.Generator().manual_seed(count)
    hidden = 5.0 * torch.randn(num_layers, count, SIZE, generator=generator)
    token_ids = torch.randint(VOCAB, (count,), generator=generator).numpy()
    known = (torch.arange(count) % 3 != 1).numpy()
    front = CpuHeadInputs(weights, EPS, flavour)
    tolerance = LOGITS[ACTIVATION_DTYPE[flavour]]

    scaled = F.rms_norm(hidden.double(), (SIZE,), eps=EPS)
    scaled = scaled * weights["feature_scale"][:, None] + weights["feature_shift"][:, None]
    features = F.linear(scaled.transpose(0, 1).flatten(1), weights["fuse"].double()) if fused else scaled[0]
    replaced = torch.where(torch.from_numpy(known)[:, None], features, weights["unknown"].double())
    found = front.from_hidden(token_ids, hidden, known)
    assert scaled_error(found, expected(weights, token_ids, replaced)) <= tolerance

    own = torch.randn(count, SIZE, generator=generator)
    found = front.from_features(token_ids, own)
    assert scaled_error(found, expected(weights, token_ids, own.double())) <= tolerance


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_tokens_input_does_not_depend_on_its_company(flavour: str) -> None:
    weights = make_front(3, fused=True)
    front = CpuHeadInputs(weights, EPS, flavour)
    hidden, token_ids = torch.randn(3, 40, SIZE), np.arange(40)
    known = np.ones(40, np.bool_)
    together = front.from_hidden(token_ids, hidden, known)
    for t in (0, 31, 39):
        alone = front.from_hidden(token_ids[t : t + 1], hidden[:, t : t + 1], known[:1])
        assert torch.equal(alone[0], together[t])


def test_tokens_outside_the_vocabulary_are_caught() -> None:
    front = CpuHeadInputs(make_front(1, fused=False), EPS)
    for token in (-1, VOCAB):
        with pytest.raises(AssertionError, match="vocabulary"):
            front.from_features(np.array([token]), torch.zeros(1, SIZE))
    assert front.from_features(np.zeros(0, np.int64), torch.zeros(0, SIZE)).shape == (0, SIZE)
