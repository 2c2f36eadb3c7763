"""SmolLM2-135M: our greedy tokens equal transformers' on the same weights, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.model.decoder import Decoder
from specdec.model.names import from_hf_name
from specdec.model.weights import LoadedModel
from tests.helpers.paged import PagedRun

NUM_NEW = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "12345 + 678 =",
    "Water boils at",
    "The three primary colours are",
    "To bake a simple loaf of bread, you need",
    "SELECT name FROM users WHERE",
    "In 1969, the first humans",
    "A haiku about autumn:\n",
    "Q: What is the largest planet?\nA:",
    "Translate to French: 'Good morning' ->",
    "import numpy as np\n\nx = np.",
    "The theory of relativity states that",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Photosynthesis is the process by which",
    "Zürich is a city in",
    "The opposite of hot is",
    "My favourite book is",
]


@pytest.fixture(scope="module")
def expected(smollm2_float32: LoadedModel) -> list[list[int]]:
    """transformers' continuation of each prompt, from left-padded batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = smollm2_float32
    config = model.config
    reference: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_model_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta[0]},
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            ours = from_hf_name(name, config)
            assert ours is not None
            weight.copy_(model.weights[ours])
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = reference.generate(
            ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
        )
    return out[:, width:].tolist()


def test_metadata_comes_from_the_file(smollm2_float32: LoadedModel) -> None:
    config = smollm2_float32.config
    assert (config.max_model_len, config.norm_eps, config.rope_theta[0]) == (8192, 1e-5, 100_000.0)


def test_greedy_tokens_equal_transformers(smollm2_float32: LoadedModel, expected: list[list[int]]) -> None:
    model = smollm2_float32
    decoder = Decoder(model.config, model.weights, torch.float32, "cpu")
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    run = PagedRun(decoder, len(prompts), max(map(len, prompts)) + NUM_NEW, block_size=16)
    new = dict(enumerate(prompts))
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(NUM_NEW):
        best = [int(logits[-1].argmax()) for logits in run.step(new)]
        for row, token in enumerate(best):
            tokens[row].append(token)
        new = {row: [token] for row, token in enumerate(best)}
    assert tokens == expected
