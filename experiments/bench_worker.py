"""One engine in its own process, timed on demand: what ``cpu_bench`` interleaves.

Each engine lives in a process of its own, so their thread pools never compete and peak memory is the engine's
own. The protocol is one JSON object per line: in ``{"case": …}``, out ``{"tokens": …, "seconds": …}``. The
first line out reports start-up: ``{"ready": …, "startup_s": …}``.

    python -m experiments.bench_worker specdec '{"model": "smollm2-135m", "threads": 2}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from experiments.memory import own_peak_mb

PROCESS_START = time.perf_counter()


class Peer(Protocol):
    """An engine that can serve greedy batches of token-id prompts."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly ``new_tokens`` greedy tokens for each prompt, end-of-sequence ignored, all at once."""
        ...


class Specdec:
    """This project."""

    def __init__(self, options: dict[str, Any]) -> None:
        from specdec import LLM

        self.llm = LLM(
            options["model"],
            dtype=options["dtype"],
            backend=options["backend"],
            threads=options["threads"],
            max_model_len=options["max_model_len"],
            kv_memory_bytes=options["kv_memory_bytes"],
            prefix_caching=False,
        )
        self.llm.configure(**self.choice(None, 0))

    @staticmethod
    def choice(drafter: Any, num_drafts: int) -> dict[str, Any]:
        return {"drafter": drafter, "num_drafts": num_drafts, "prefix_caching": False}

    def configure(self, drafter: Any, num_drafts: int) -> None:
        self.llm.configure(**self.choice(drafter, num_drafts))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        from specdec import SamplingParams

        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return [out.token_ids for out in self.llm.generate(prompts, params)]

    def verify_step(self, context: int, num_tokens: int, repeats: int) -> float:
        """Median seconds of one target pass over ``num_tokens`` tokens after ``context`` tokens."""
        import numpy as np

        from specdec.rows import RowState, StepInput

        state = RowState(1, self.llm.max_model_len, 0)
        state.tokens[0] = np.random.default_rng(0).integers(5, 1000, state.tokens.shape[1])
        blocks = np.arange(self.llm.num_blocks, dtype=np.int32)[None]

        def step(start: int, count: int) -> float:
            row, (at, tokens) = np.zeros(1, np.int64), np.array([[start], [count]], np.int32)
            batch = StepInput(state, blocks, self.llm.block_size, row, at, tokens, tokens)
            begin = time.perf_counter()
            self.llm.runner.forward(batch)
            return time.perf_counter() - begin

        step(0, context)
        return float(np.median([step(context, num_tokens) for _ in range(repeats)]))


class Transformers:
    """Hugging Face transformers with the same weights, from the model's exported directory."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        transformers.logging.set_verbosity_error()
        self.torch = torch
        dtype = getattr(torch, options["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            options["directory"], dtype=dtype
        ).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        torch = self.torch
        assert len({len(prompt) for prompt in prompts}) == 1, "prompts of one length need no padding"
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()


class Vllm:
    """vLLM, offline API."""

    def __init__(self, options: dict[str, Any]) -> None:
        import os

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", str(options["threads"]))
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.llm = LLM(
            options["directory"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on the model's GGUF file; one request after another."""

    def __init__(self, options: dict[str, Any]) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        self.llama = Llama(
            options["gguf"], n_ctx=options["max_model_len"], n_threads=options["threads"], verbose=False
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        outputs = []
        for prompt in prompts:
            self.llama.reset()
            stream = self.llama.generate(prompt, temp=0.0)
            outputs.append([next(stream) for _ in range(new_tokens)])
        return outputs


PEERS: dict[str, Callable[[dict[str, Any]], Peer]] = {
    "specdec": Specdec,
    "transformers": Transformers,
    "vllm": Vllm,
    "llama_cpp": LlamaCpp,
}


def serve(name: str, options: dict[str, Any]) -> None:
    peer = PEERS[name](options)
    first = peer.generate([[5, 6, 7, 8]], 1)
    assert len(first[0]) == 1
    reply({"ready": name, "startup_s": time.perf_counter() - PROCESS_START})
    for line in sys.stdin:
        reply(answer(peer, json.loads(line)))


def answer(peer: Peer, case: dict[str, Any]) -> dict[str, Any]:
    """Run one case: a batch of prompts, or a bare verification step."""
    if "drafter" in case:
        assert isinstance(peer, Specdec)
        peer.configure(case["drafter"], case["num_drafts"])
    if "verify_tokens" in case:
        assert isinstance(peer, Specdec)
        seconds = peer.verify_step(case["context"], case["verify_tokens"], case["repeats"])
        return {"seconds": seconds, "peak_rss_mb": own_peak_mb()}
    begin = time.perf_counter()
    outputs = peer.generate(case["prompts"], case["new_tokens"])
    seconds = time.perf_counter() - begin
    assert all(len(tokens) == case["new_tokens"] for tokens in outputs)
    return {
        "seconds": seconds,
        "tokens": sum(map(len, outputs)),
        "peak_rss_mb": own_peak_mb(),
        "outputs": outputs,
    }


def reply(message: dict[str, Any]) -> None:
    REPLIES.write(json.dumps(message) + "\n")
    REPLIES.flush()


if __name__ == "__main__":
    # Libraries print to stdout as they like; replies go out on the original descriptor.
    import os

    REPLIES = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], json.loads(sys.argv[2]))
