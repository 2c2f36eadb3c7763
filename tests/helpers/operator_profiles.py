"""A small operator profile and a bench run in LLMServingSim's format, made up from laws that the tests know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROWS = (1, 4, 8, 16, 32, 64)
CONTEXTS = (16, 64, 256, 1024, 4096)
CHUNKS = (16, 64, 256, 1024)


def layer_us(tokens: float) -> float:
    """All dense kernels of a layer but the two norms."""
    return max(100.0, 0.5 * tokens)


def decode_us(rows: float, context: float) -> float:
    return 10.0 + 0.01 * max(rows * context, 64.0 * rows)


def prefill_us(chunk: float, context: float) -> float:
    return 10.0 + 1e-3 * chunk * (context + 0.5 * (chunk + 1.0))


def mixed_us(rows: float, context: float, chunk: float) -> float:
    return 0.02 * rows * context + rows * (1.0 + 1e-3 * chunk)


def write_profile(
    folder: Path, model: str = "meta-llama/Llama-3.1-8B", chip: str = "NVIDIA GeForce RTX 4090"
) -> Path:
    """``folder/tp1`` with its ``meta.yaml``; returns ``folder``."""
    inner = folder / "tp1"
    inner.mkdir(parents=True)
    (folder / "meta.yaml").write_text(f"model: {model}\ngpu: {chip}\nvllm_version: 0.0.0\n")
    parts = {
        "qkv_proj": 0.2,
        "o_proj": 0.15,
        "gate_up_proj": 0.4,
        "down_proj": 0.2,
        "act_fn": 0.03,
        "rotary_emb": 0.02,
    }
    dense = [
        (name, tokens, share * layer_us(tokens)) for name, share in parts.items() for tokens in TOKENS
    ] + [(name, tokens, 1.0) for name in ("layernorm", "embedding", "final_layernorm") for tokens in TOKENS]
    pl.DataFrame(dense, schema=["layer", "tokens", "time_us"], orient="row").write_csv(inner / "dense.csv")
    heads = [
        (name, rows, us + 0.1 * rows) for name, us in (("lm_head", 500.0), ("sampler", 20.0)) for rows in ROWS
    ]
    pl.DataFrame(heads, schema=["layer", "sequences", "time_us"], orient="row").write_csv(
        inner / "per_sequence.csv"
    )
    points: list[tuple[float, ...]] = []
    points += [(0, 0, rows, context, decode_us(rows, context)) for rows in ROWS for context in CONTEXTS]
    for chunk in CHUNKS:
        for before in (0, 256, 1024):
            points.append((chunk, before, 0, 0, prefill_us(chunk, before)))
            points += [
                (chunk, before, rows, context, prefill_us(chunk, before) + mixed_us(rows, context, chunk))
                for rows in ROWS
                for context in CONTEXTS
            ]
    names = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"]
    frame = pl.DataFrame(np.array(points), schema=names)
    frame.write_csv(inner / "attention.csv")
    return folder


def write_run(folder: Path, requests: list[dict[str, Any]], **kv_cache: Any) -> Path:
    """A bench run of ``requests``: input_toks, output_toks, arrival_time, queued_ts, first_token_ts, last_token_ts."""
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"request_id": f"bench-{index}", **request}) for index, request in enumerate(requests)
    ]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    meta = {
        "model": "meta-llama/Llama-3.1-8B",
        "vllm_version": "0.0.0",
        "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 4096},
        "kv_cache": {"num_gpu_blocks": 200, "block_size": 16, "enable_prefix_caching": True} | kv_cache,
        "hardware": {"device_name": "NVIDIA GeForce RTX 4090", "device_total_memory_bytes": 25_250_627_584},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
