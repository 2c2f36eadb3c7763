"""Configurations in their old and new forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.model.config import ModelConfig
from tests.helpers.models import FAMILIES, FAMILY_OPTIONS, SHAPE

MINIMAL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def config(model_type: str = "llama", **options: Any) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": model_type, **MINIMAL, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_keys_take_the_family_defaults(family: str) -> None:
    from transformers import AutoConfig

    reference = AutoConfig.for_model(family, **MINIMAL)
    written, silent = ModelConfig.from_hf(reference.to_dict()), config(family)
    differing = [
        name for name in ModelConfig.__dataclass_fields__ if getattr(written, name) != getattr(silent, name)
    ]
    # Token ids are a matter of each checkpoint.
    assert set(differing) <= {"eos_token_ids", "bos_token_id"}


@pytest.mark.parametrize("family", FAMILIES)
def test_inverse_frequencies_equal_transformers(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    reference = AutoConfig.for_model(family, **{**SHAPE, **FAMILY_OPTIONS[family]})
    rotary = AutoModelForCausalLM.from_config(reference).model.rotary_emb
    ours = ModelConfig.from_hf(reference.to_dict())
    for layer in range(ours.num_layers):
        kind = reference.layer_types[layer] if family == "gemma3_text" else None
        expected = getattr(rotary, f"{kind}_inv_freq") if kind else rotary.inv_freq
        torch.testing.assert_close(ours.inv_freq(layer), expected, rtol=1e-6, atol=0)


def test_old_and_new_rope_keys_agree() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == new
    assert not torch.equal(old.inv_freq(0), config(rope_theta=5e5).inv_freq(0))


def test_gemma_old_form_has_a_local_base_and_scales_only_global_layers() -> None:
    options = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    gemma = config("gemma3_text", sliding_window=16, sliding_window_pattern=3, head_dim=8, **options)
    assert gemma.sliding_window == (16, 16, None, 16, 16, None, 16)
    assert gemma.rope_theta == (1e4, 1e4, 1e6, 1e4, 1e4, 1e6, 1e4)
    assert [scaling is None for scaling in gemma.rope_scaling] == [True, True, False, True, True, False, True]


def test_gemma_wrapper_uses_its_text_config() -> None:
    text = {"model_type": "gemma3_text", **MINIMAL}
    wrapped = ModelConfig.from_hf({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert wrapped.family == "gemma3_text"
    assert wrapped.eos_token_ids == (1, 106)
    assert wrapped.tie_embeddings
    assert wrapped.norm_offset == 1.0


def test_sliding_window_of_mistral_and_qwen2() -> None:
    assert config("mistral", sliding_window=9).sliding_window == (9,) * 7
    assert config("mistral", sliding_window=None).sliding_window == (None,) * 7
    assert config("qwen2", sliding_window=9, use_sliding_window=False).sliding_window == (None,) * 7
    used = config("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=5)
    assert used.sliding_window == (None,) * 5 + (9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_type": "mamba"},
            r"unsupported architecture 'mamba'.*llama, mistral, qwen2, qwen3, gemma3_text",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "unsupported rope scaling type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "unsupported rope scaling type 'dynamic'"),
        ({"hidden_act": "relu"}, "unsupported activation 'relu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_unsupported_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({"model_type": "llama", **MINIMAL, **options})
