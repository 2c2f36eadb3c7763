"""The offline API: ``LLM(model, drafter=…).generate(prompts, SamplingParams(…))``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from specdec.drafter import make_drafter
from specdec.drafter.synthetic import SyntheticDrafter
from specdec.engine import Engine
from specdec.model.weights import LoadedModel, load_model
from specdec.names import unknown_name
from specdec.output import OnToken, RequestOutput
from specdec.rows import RowState, StepInput
from specdec.runner import RunnerOptions, choose_backend, kv_bytes_per_block, make_runner
from specdec.scheduler import SamplingParams, SchedulerConfig, StepLoop, make_controller, make_policy
from specdec.scheduler.plan import IntArray
from specdec.scheduler.speculation import Off
from specdec.step_times import PROVISIONAL, DeviceTimes, needs_times
from specdec.trace import TraceWriter

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
_CHUNK = 1024  # prompt tokens of one pass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LLM:
    """A model, a drafter and a scheduler, ready to generate.

    Args:
        model: a short name (``"smollm2-135m"``), a hub id, a directory with safetensors, a GGUF file, or a
            model that is loaded already.
        drafter: see :meth:`configure`, which takes the remaining options too.
        dtype: ``"bfloat16"``, ``"float32"`` or ``"float16"``.
        backend: ``"auto"``, ``"eager"``, ``"native"`` or ``"triton"`` (see ``specdec.runner``).
        kv_dtype: ``"int8"`` or ``"fp8"`` for a quantised KV cache; default the model's own.
        batch_invariant: a token's logits do not depend, to the bit, on what else is in its step, so that greedy
            speculative decoding in bfloat16 equals plain decoding. The native backend always is so, triton if asked.
        graphs: ``"off"`` runs triton's steps without CUDA graphs.
        device: a torch device; default CUDA if there is one, else the CPU.
        max_model_len: most tokens of a request, prompt included; default the model's limit, at most 4096.
        num_blocks: KV blocks; default what ``kv_memory_bytes`` holds.
        kv_memory_bytes: memory for the KV cache when ``num_blocks`` is not given; never more is taken than
            ``max_num_seqs`` requests of full length can use.
        block_size: tokens per KV block.
        threads: CPU threads; default torch's.
        quantization: ``"int4"`` or ``"int8"`` rounds the linear layers' weights to so many bits, ``"fp8"`` (eager and
            triton) weights and activations to float8. Lossless then means equal to the quantised model's plain
            decoding. Triton stores the weights so and multiplies with them; on the other backends output is that of
            the quantised model, speed is not, nor is memory but for fp8 (see ``specdec.model.quantize``).
        group_size: weights of int4 or int8 that share a scale, 32, 64 or 128; default 32.

    Raises:
        ValueError: an option that does not exist or does not fit, named with its value and the remedy.
    """

    def __init__(
        self,
        model: str | LoadedModel = "smollm2-135m",
        drafter: str | Mapping[str, Any] | None = None,
        *,
        dtype: str = "bfloat16",
        backend: str = "auto",
        kv_dtype: str | None = None,
        batch_invariant: bool = False,
        graphs: str = "auto",
        device: str | None = None,
        max_model_len: int | None = None,
        num_blocks: int | None = None,
        kv_memory_bytes: int = 512 * 2**20,
        block_size: int = 16,
        threads: int | None = None,
        quantization: str | None = None,
        group_size: int | None = None,
        **options: Any,
    ) -> None:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads={threads} must be >= 1")
            torch.set_num_threads(threads)
        known = list(signature(self.configure).parameters)
        for name in options:
            if name not in known:
                raise unknown_name("option", name, [*known, *signature(LLM).parameters])
        make_drafter(drafter)  # a wrong drafter fails before the model is loaded
        how = RunnerOptions(
            backend=backend,
            kv_dtype=kv_dtype,
            batch_invariant=batch_invariant,
            graphs=graphs,
            quantization=quantization,
            group_size=group_size,
        )
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_model(model, dtype=DTYPES[dtype]) if isinstance(model, str) else model
        config = loaded.config
        how = choose_backend(how, config, DTYPES[dtype], place)
        self.max_model_len = min(config.max_model_len, 4096) if max_model_len is None else max_model_len
        if self.max_model_len > config.max_model_len:
            raise ValueError(
                f"max_model_len={max_model_len} exceeds the model's limit of {config.max_model_len}"
            )
        self.block_size = block_size
        if num_blocks is None:
            most: int = options.get("max_num_seqs", 64) * -(-self.max_model_len // block_size)
            block_bytes = kv_bytes_per_block(how, config, DTYPES[dtype], block_size)
            num_blocks = min(most, kv_memory_bytes // block_bytes)
        self.num_blocks = num_blocks
        self.tokenizer = loaded.tokenizer
        most_rows = max(options.get("max_num_seqs", 64), 1)
        how = replace(how, max_rows=most_rows, max_model_len=self.max_model_len)
        self.runner = make_runner(loaded, how, DTYPES[dtype], self.num_blocks, block_size, place)
        self.device_times = DeviceTimes(self.runner, self.tokenizer)
        self._references: dict[tuple[bytes, SamplingParams], IntArray] = {}
        self.configure(drafter, **options)

    def configure(
        self,
        drafter: str | Mapping[str, Any] | None = None,
        *,
        num_drafts: int = 4,
        speculation: str | Mapping[str, Any] = "fixed",
        rule: str = "token",
        policy: str | Mapping[str, Any] = "chunked",
        order: str = "fcfs",
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        prefix_caching: bool = True,
        watermark: float = 0.01,
        ageing_s: float = math.inf,
        num_swap_blocks: int = 0,
        num_scheduler_steps: int = 1,
        overlap: bool = False,
        seed: int = 0,
    ) -> LLM:
        """Choose drafter and scheduler anew, keeping the loaded model; returns self.

        Args:
            drafter: ``None``, a name (``"ngram"``, ``"layer_skip"``) or a mapping with options, e.g.
                ``{"name": "draft_model", "model": "path/to/draft"}``.
            num_drafts: draft tokens per step, k.
            speculation: ``"fixed"``, ``"adaptive"``, ``"load_threshold"``, ``"goodput"`` or ``"off"``, or a mapping
                with options. Goodput decides by the step times of the device: without ``step_tokens`` and ``step_s``
                they are measured here, which takes a few seconds (``specdec.step_times``), once for this model and
                the largest ``max_num_seqs`` and ``num_drafts`` so far, and the drafter's once for each drafter. With
                them nothing is measured, and other times that are left out count as 0.
            rule: how sampled drafts are verified, ``"token"`` or ``"block"``; of trees that is ``"recursive"`` or
                ``"traversal"``, which mean the same. All are lossless.
            policy: batching policy: ``"static"``, ``"dynamic"``, ``"continuous"``, ``"chunked"``, or a mapping
                with options, e.g. ``{"name": "dynamic", "window_s": 0.1}``.
            order: ``"fcfs"``, ``"sjf"``, ``"priority"`` or ``"edf"``.
            max_num_seqs: most requests that run at once.
            max_num_batched_tokens: most tokens the target computes in one step.
            prefix_caching: share the KV of common prefixes.
            watermark: share of the blocks that an admission leaves free while others run.
            ageing_s: under the order ``"priority"``, waiting so long raises a request's priority by one.
            num_swap_blocks: KV blocks in host memory for preempted requests; 0 computes them again.
            num_scheduler_steps: requests join a running batch at every so-manyth step only.
            overlap: while the device computes a step, plan the next one as far as it does not hang on the results, and
                stream, trace and hand over those of the step before; for GPUs.
            seed: noise of requests that bring no seed of their own.

        Raises:
            ValueError: an option that does not exist or does not fit, named with its value and the remedy.
        """
        the_drafter = make_drafter(drafter)
        the_policy = make_policy(**_options(policy))
        control = _speculation_options(speculation, num_drafts, the_drafter is not None)
        measures = needs_times(control)
        controller = make_controller(**{**control, **PROVISIONAL} if measures else control)
        if max_num_batched_tokens is None:
            # A policy that computes prompts whole must be able to compute the longest one.
            budget = 1024 if the_policy.chunked_prefill else self.max_model_len
            max_num_batched_tokens = max(budget, max_num_seqs)
        scheduler = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            prefix_caching=prefix_caching,
            watermark=watermark,
            order=order,
            ageing_s=ageing_s,
            preemption="swap" if num_swap_blocks else "recompute",
            num_swap_blocks=num_swap_blocks,
            num_scheduler_steps=num_scheduler_steps,
        )
        loop = StepLoop(scheduler, the_policy, controller)
        self.engine = Engine(self.runner, self.tokenizer, loop, the_drafter, rule, seed, overlap)
        if measures:
            # Only now: it overwrites KV blocks, and the options are known to be right.
            loop.speculation = make_controller(**self.device_times.filled(control, drafter, scheduler))
        return self

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        arrivals_s: Sequence[float] | None = None,
        tasks: Sequence[str] | None = None,
        priorities: Sequence[int] | None = None,
        deadlines_s: Sequence[float] | None = None,
        on_token: OnToken | None = None,
        on_finish: Callable[[RequestOutput], None] | None = None,
        trace: TraceWriter | None = None,
    ) -> list[RequestOutput]:
        """Serve ``prompts``; outputs in their order.

        Args:
            prompts: each a text, a list of chat messages (``{"role": …, "content": …}``) or token ids. One
                text alone is taken as one prompt.
            params: for all prompts, or one for each.
            arrivals_s: when each arrives, in seconds from now; default all at once.
            tasks, priorities, deadlines_s: one per prompt, for reports and for the queue's order.
            on_token: streaming callback, called after each step.
            on_finish: called with each output as soon as it exists.
            trace: where steps and requests are recorded.

        Raises:
            ValueError: a prompt that is empty, too long, or can never run; before any work starts.
        """
        encoded = self.encode(prompts)
        count = len(encoded)
        every = (
            [params or SamplingParams()] * count
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        columns: dict[str, Sequence[Any] | None] = {
            "arrival_s": arrivals_s,
            "task": tasks,
            "priority": priorities,
            "deadline_s": deadlines_s,
        }
        for name, values in {"params": every, **columns}.items():
            if values is not None and len(values) != count:
                raise ValueError(f"{len(values)} values of {name} for {count} prompts: give one for each")
        self._record_references(encoded, every)
        engine = self.engine
        engine.trace = trace
        try:
            for index, prompt in enumerate(encoded):
                extra = {name: values[index] for name, values in columns.items() if values is not None}
                engine.add_request(prompt, every[index], on_token=on_token, **extra)
            return engine.run(on_finish)
        finally:
            engine.abandon()
            engine.trace = None

    def continuation_logits(
        self, prompt: IntArray, continuations: Iterable[Sequence[int]]
    ) -> Iterator[Tensor]:
        """What the target says after ``prompt`` and after each token of a continuation, one by one.

        For judging outputs: it runs the model alone, in KV blocks that the engine does not need meanwhile.

        Args:
            prompt: int32 [n].
            continuations: of c token ids each.

        Yields:
            float32 [c + 1, V] for each: the logits before its first token and after each of its tokens.

        Raises:
            ValueError: a continuation that the context or the free KV blocks cannot hold.
        """
        pool, size = self.engine.loop.pool, self.block_size
        prompt = np.ascontiguousarray(prompt, np.int32)
        state = RowState(1, self.max_model_len, 0)
        state.tokens[0, : prompt.size] = prompt
        row = np.zeros(1, np.int64)

        def ints(value: int) -> IntArray:
            return np.full(1, value, np.int32)

        is_computed, blocks = False, np.zeros(0, np.int64)
        try:
            for tokens in continuations:
                total = prompt.size + len(tokens)
                more = pool.blocks_for(total) - blocks.size
                if total > self.max_model_len or more > pool.num_free:
                    raise ValueError(
                        f"a prompt of {prompt.size} tokens + {len(tokens)} do not fit: max_model_len="
                        f"{self.max_model_len}, free are {pool.num_free} KV blocks of {size} tokens"
                    )
                if more > 0:
                    blocks = np.concatenate([blocks, pool.allocate(more)])
                table = blocks[None].astype(np.int32)
                state.tokens[0, prompt.size : total] = tokens
                if not is_computed:
                    for start in range(0, prompt.size - 1, _CHUNK):
                        count = min(_CHUNK, prompt.size - 1 - start)
                        chunk = StepInput(state, table, size, row, ints(start), ints(count), ints(0))
                        self.runner.forward(chunk)
                    is_computed = True
                count = ints(len(tokens) + 1)
                yield self.runner.forward(
                    StepInput(state, table, size, row, ints(prompt.size - 1), count, count)
                )
        finally:
            pool.release(blocks)

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[IntArray]:
        """Token ids of each prompt, int32 [n]."""
        single = isinstance(prompts, str) or (
            len(prompts) > 0 and isinstance(prompts[0], int | np.integer | Mapping)
        )
        every = cast("Sequence[Prompt]", [prompts] if single else prompts)
        return [np.array(self._encode(index, prompt), np.int32) for index, prompt in enumerate(every)]

    def _encode(self, index: int, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.apply_chat_template(cast("Sequence[Mapping[str, str]]", prompt))
        else:
            ids = list(cast("Sequence[int]", prompt))
        if not ids:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        return ids

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within this context the engine decodes without speculation."""
        engine = self.engine
        drafter, speculation = engine.drafter, engine.loop.speculation
        engine.drafter, engine.loop.speculation = None, Off()
        try:
            yield
        finally:
            engine.drafter, engine.loop.speculation = drafter, speculation

    def _record_references(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> None:
        """Let a synthetic drafter see the target's greedy output of prompts that are new to it."""
        drafter = self.engine.drafter
        if not isinstance(drafter, SyntheticDrafter):
            return
        for one in params:
            if not one.is_greedy or one.repetition_penalty != 1.0 or one.presence_penalty != 0.0:
                raise ValueError(
                    "the synthetic drafter drafts the target's own greedy continuation: set temperature=0 and no "
                    f"penalties (got temperature={one.temperature})"
                )
        keys = [
            (prompt.tobytes(), replace(one, logprobs=None, seed=None))
            for prompt, one in zip(prompts, params, strict=True)
        ]
        new = [index for index, key in enumerate(keys) if key not in self._references]
        with self.plain():
            for index in new:
                self.engine.add_request(prompts[index], keys[index][1])
            for index, output in zip(new, self.engine.run(), strict=True):
                self._references[keys[index]] = np.array(output.token_ids, np.int32)
        for prompt, key in zip(prompts, keys, strict=True):
            drafter.record(prompt, self._references[key])


def _options(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": spec} if isinstance(spec, str) else dict(spec)


def _speculation_options(spec: str | Mapping[str, Any], num_drafts: int, has_drafter: bool) -> dict[str, Any]:
    """Controller options; ``num_drafts`` is their ``max_drafts`` unless the mapping gives its own."""
    if num_drafts < 0:
        raise ValueError(f"num_drafts k={num_drafts} must be >= 0 (0 turns speculation off)")
    options = _options(spec)
    if not has_drafter or options.get("name") == "off":
        return {"name": "off"}
    return {"max_drafts": num_drafts, **options}
