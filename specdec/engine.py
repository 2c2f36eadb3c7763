"""The main loop: begin → draft → verify → accept → commit → trace.

The engine executes what the scheduler's ``StepLoop`` plans, on a device, and tells it what happened. It makes
no scheduling decision of its own, which is why the simulator can drive the same loop.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from specdec.acceptor import Acceptor, Selection
from specdec.drafter.base import Draft, Drafter, DraftHost, Verified
from specdec.model.batch import Captured
from specdec.model.tokenizer import Tokenizer
from specdec.output import OnToken, RequestOutput, StreamEvent, TextStream, TokenLogprobs
from specdec.random import derive_seed
from specdec.rows import RowState, StepInput, StepLayout, ragged_arange, verification_counts
from specdec.runner import Runner
from specdec.scheduler import Request, SamplingParams, StepLoop, StepOutcome, StepPlan, hash_blocks
from specdec.scheduler.plan import BoolArray, IntArray, LongArray
from specdec.trace import RequestRecord, TraceWriter
from specdec.tree import pack_trees


@dataclass(slots=True, eq=False)
class Job:
    """The engine's side of one request: everything the scheduler must not know."""

    request: Request
    params: SamplingParams
    prompt: IntArray
    tokens: IntArray
    seed: int
    stream: TextStream | None
    on_token: OnToken | None
    row: int = -1
    finish_reason: str = "length"
    stopped_by_text: bool = False
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    position_drafted: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    position_accepted: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))


class Engine:
    """Runs requests over one target model.

    Args:
        runner: the target model with its KV cache.
        tokenizer: for stop strings and output text.
        loop: the scheduler; its pool has the runner's blocks.
        drafter: proposes tokens, or ``None`` for plain decoding.
        rule: verification rule for sampled rows, "token" or "block"; of trees "recursive" or "traversal", which are
            the same rules there. Trees of deterministic drafts are verified one-hot.
        seed: from which requests without a seed derive theirs.
        overlap: while the device computes a step, the next one is planned as far as it does not hang on the results
            (``StepLoop.look_ahead``), and what only readers of the last step's results wait for is done: streamed text,
            traces, finished outputs. A GPU computes meanwhile; a pass on the CPU is over by then.
        clock: seconds since an arbitrary start; replaced at the start of each :meth:`run`.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        loop: StepLoop,
        drafter: Drafter | None = None,
        rule: str = "token",
        seed: int = 0,
        overlap: bool = False,
    ) -> None:
        config = loop.config
        self.runner, self.tokenizer, self.loop, self.drafter, self.seed = (
            runner,
            tokenizer,
            loop,
            drafter,
            seed,
        )
        self.max_drafts = loop.speculation.max_drafts if drafter else 0
        self.state = RowState(config.max_num_seqs, config.max_model_len, self.max_drafts)
        self.acceptor = Acceptor(rule, self.state, runner.ops)
        self.trace: TraceWriter | None = None
        self._jobs: dict[int, Job] = {}
        self._watched: dict[int, Job] = {}
        self._swapped: dict[int, list[Tensor]] = {}
        self._arrivals: list[tuple[float, int]] = []
        self._next_id = 0
        self._overlap = overlap
        self._later: list[Callable[[], None]] = []
        self._layout: StepLayout | None = None
        self._start_s = time.perf_counter()
        self._carried_s = 0.0
        self._eos = np.array(sorted(tokenizer.eos_token_ids), np.int64)
        if drafter:
            drafter.bind(DraftHost(self.state, loop.table, runner, config.num_blocks, config.block_size))

    def clock(self) -> float:
        """Seconds since the start of the current run."""
        return time.perf_counter() - self._start_s

    def add_request(
        self,
        prompt: IntArray,
        params: SamplingParams,
        *,
        arrival_s: float = 0.0,
        priority: int = 0,
        deadline_s: float = math.inf,
        task: str = "",
        on_token: OnToken | None = None,
    ) -> int:
        """Register a request that arrives ``arrival_s`` seconds into the next run; its id.

        Args:
            prompt: int32 [n] token ids.

        Raises:
            ValueError: empty prompt, token ids outside the vocabulary, or a request that can never run.
        """
        prompt = np.ascontiguousarray(prompt, np.int32)
        vocab_size, limit = self.runner.config.vocab_size, self.loop.config.max_model_len
        if prompt.size == 0:
            raise ValueError(f"prompt {self._next_id} is empty: give at least one token")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"prompt {self._next_id} has token ids outside the vocabulary 0..{vocab_size - 1}"
            )
        if prompt.size >= limit:
            raise ValueError(
                f"prompt {self._next_id} has {prompt.size} tokens, the context holds max_model_len={limit}, output "
                "included: shorten the prompt or raise max_model_len"
            )
        caching, size = self.loop.config.prefix_caching, self.loop.config.block_size
        request = Request(
            request_id=self._next_id,
            prompt_len=prompt.size,
            max_tokens=min(params.max_tokens, limit - prompt.size),
            arrival_s=arrival_s,
            priority=priority,
            deadline_s=deadline_s,
            block_hashes=hash_blocks(prompt, size) if caching else [],
            task=task,
        )
        self.loop.check(request)
        needs_text = bool(params.stop) or on_token is not None
        self._jobs[request.request_id] = Job(
            request=request,
            params=params,
            prompt=prompt,
            tokens=prompt,
            seed=derive_seed(self.seed, request.request_id) if params.seed is None else params.seed,
            stream=TextStream(self.tokenizer, params.stop) if needs_text else None,
            on_token=on_token,
            position_drafted=np.zeros(self.max_drafts, np.int32),
            position_accepted=np.zeros(self.max_drafts, np.int32),
        )
        heapq.heappush(self._arrivals, (arrival_s, request.request_id))
        self._next_id += 1
        return request.request_id

    def run(self, on_finish: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        """Serve every registered request in real time; outputs in the order of their ids.

        ``on_finish`` gets each output as soon as it exists.
        """
        self._start_s = time.perf_counter()
        outputs: list[RequestOutput] = []
        while self._arrivals or self.loop.has_work:
            plan, finished = self.step(self.clock())
            for job in finished:
                self._defer(partial(self._hand_over, job, outputs, on_finish))
            if plan.is_empty:
                self._catch_up()
                wake_s = min(self._arrivals[0][0] if self._arrivals else math.inf, plan.wake_s)
                assert wake_s < math.inf, "the scheduler is idle with requests waiting"
                time.sleep(max(0.0, wake_s - self.clock()))
        self._catch_up()
        return sorted(outputs, key=lambda output: output.request_id)

    def _hand_over(
        self,
        job: Job,
        outputs: list[RequestOutput],
        on_finish: Callable[[RequestOutput], None] | None,
    ) -> None:
        outputs.append(self._output(job))
        if on_finish:
            on_finish(outputs[-1])

    def _defer(self, work: Callable[[], None]) -> None:
        """Do ``work`` now or, with ``overlap``, beside the next step's pass."""
        if self._overlap:
            self._later.append(work)
        else:
            work()

    def _catch_up(self) -> None:
        work, self._later = self._later, []
        for one in work:
            one()

    def step(self, now_s: float) -> tuple[StepPlan, list[Job]]:
        """One step: the plan that was executed (perhaps empty) and the jobs that finished in it."""
        self._submit_arrived(now_s)
        plan = self.loop.begin(now_s)
        self._enter(plan)
        if plan.is_empty:
            return plan, []
        planned_s = self.clock()
        draft = self.drafter.propose(plan) if self.drafter else Draft.none(plan.rows.size)
        drafted_s = self.clock()
        batch, depths = self._input(plan, draft)
        logits, captured = self._forward(batch)
        # A GPU has only been asked to begin.
        if self._overlap:
            self._look_ahead(plan)
        self._catch_up()
        verified_s = self.clock()
        selection = self.acceptor.select(plan, draft, logits)
        if draft.parents is not None:
            self._compact(plan, selection)
        sampled_s = self.clock()
        counts, finished = self._emit(plan, depths, selection)
        hashed_rows, hashes = self._hash_new_blocks(plan, counts)
        outcome = StepOutcome(
            num_drafted=draft.num_drafted,
            num_accepted=selection.num_accepted,
            num_emitted=counts,
            finished=finished,
            draft_s=drafted_s - planned_s,
            verify_s=verified_s - drafted_s,
            sample_s=sampled_s - verified_s,
            overhead_s=self.clock() - sampled_s + planned_s - now_s + self._carried_s,
            hashed_rows=hashed_rows,
            block_hashes=hashes,
            tree_depths=None if draft.parents is None else depths,
        )
        decided_s = self.clock()
        if self.drafter:
            hidden = captured.hidden if captured else None
            starts, path = selection.logit_start, selection.path
            verified = Verified(draft, logits, starts, path, batch.query_start, hidden)
            self.drafter.observe(plan, outcome, verified)
        jobs = self._commit(plan, outcome)
        if self.trace:
            loop = self.loop
            counts = loop.num_running, loop.num_waiting, loop.pool.num_free
            kept = loop.kept_ahead
            self._defer(partial(self.trace.step, plan, outcome, now_s, self.clock(), *counts, kept))
        self._carried_s = self.clock() - decided_s
        return plan, jobs

    def _look_ahead(self, plan: StepPlan) -> None:
        """Plan the step after ``plan``, and lay out its pass if it is known to draft nothing."""
        following, self._layout = self.loop.look_ahead(plan), None
        if following is not None and not following.num_drafts.any():
            counts = verification_counts(following, following.num_drafts)
            self._layout = StepLayout(following.rows, following.context, *counts)

    def _submit_arrived(self, now_s: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now_s:
            self.loop.submit(self._jobs[heapq.heappop(self._arrivals)[1]].request)
        self.loop.draining = not self._arrivals

    def _enter(self, plan: StepPlan) -> None:
        """Follow the table: save the rows that left it, load those that entered, swap and copy blocks."""
        for request_id in plan.preempted.tolist():
            self._leave(self._jobs[request_id])
        if plan.admitted.size:
            rows = self.loop.table.active[-plan.admitted.size :]
            for row, request_id in zip(rows.tolist(), plan.admitted.tolist(), strict=True):
                job = self._jobs[request_id]
                job.row = row
                self.state.load(row, job.tokens, job.prompt.size, job.params, job.seed)
                self.state.position_drafted[row] = job.position_drafted
                self.state.position_accepted[row] = job.position_accepted
                if job.stream or job.params.stop_token_ids or job.params.logprobs is not None:
                    self._watched[row] = job
        if plan.swapped_out.size or plan.swapped_in.size:
            self._swap(plan)
        self.runner.copy_blocks(plan.copies)

    def _swap(self, plan: StepPlan) -> None:
        """KV of preempted requests to host memory, then that of resumed ones back: a block may do both."""
        size, used = self.loop.config.block_size, 0
        for request_id in plan.swapped_out.tolist():
            count = -(-self._jobs[request_id].request.num_swapped // size)
            blocks = plan.swapped_out_blocks[used : used + count]
            self._swapped[request_id], used = self.runner.read_blocks(blocks), used + count
        cached = dict(zip(plan.admitted.tolist(), plan.num_cached.tolist(), strict=True))
        for request_id in plan.swapped_in.tolist():
            blocks = self.loop.table.blocks(self._jobs[request_id].row)[: -(-cached[request_id] // size)]
            self.runner.write_blocks(blocks.astype(np.int64), self._swapped.pop(request_id))

    def _leave(self, job: Job) -> None:
        job.tokens = self.state.known(job.row).copy()
        job.position_drafted = self.state.position_drafted[job.row].copy()
        job.position_accepted = self.state.position_accepted[job.row].copy()
        self._watched.pop(job.row, None)

    def _input(self, plan: StepPlan, draft: Draft) -> tuple[StepInput, IntArray]:
        """The target's pass, and the depth of each row's draft, int32 [R]: its most tokens that can be accepted."""
        counts, logits = verification_counts(plan, draft.num_drafted)
        width = draft.tokens.shape[1]
        if width:
            self.state.write_drafts(plan.rows, draft.tokens)
        offsets, masks, depths = None, None, draft.num_drafted
        if draft.parents is not None:
            node_depths, node_masks = pack_trees(draft.parents, draft.num_drafted)
            depths = node_depths.max(axis=1, initial=0)
            # Only decoding rows draft, so a tree's root is the first token of its row.
            offsets, masks = (
                ragged_arange(counts).astype(np.int32),
                np.zeros((int(counts.sum()), 2), np.int64),
            )
            drafted = np.flatnonzero(draft.num_drafted)
            sizes = counts[drafted]
            row, entry = np.repeat(drafted, sizes), ragged_arange(sizes)
            places = (np.cumsum(counts) - counts)[row] + entry
            masks[places] = node_masks[row, entry]
            offsets[places] = np.where(entry > 0, node_depths[row, np.maximum(entry, 1) - 1], 0)
        table, size = self.loop.table.block_table, self.loop.config.block_size
        layout = self._layout if self._layout and self._layout.rows is plan.rows else None
        batch = StepInput(
            self.state,
            table,
            size,
            plan.rows,
            plan.context,
            counts,
            logits,
            depths=offsets,
            tree_mask=masks,
            layout=layout,
        )
        return batch, depths

    def _forward(self, batch: StepInput) -> tuple[Tensor, Captured | None]:
        layers, captured = self.drafter.captures if self.drafter else (), None
        if layers:
            num_tokens, width = batch.token_ids.size, self.runner.config.hidden_size
            captured = Captured.empty(layers, num_tokens, width, self.runner.device)
        return self.runner.forward(batch, captured=captured), captured

    def _compact(self, plan: StepPlan, selection: Selection) -> None:
        """Move the KV of accepted nodes to where their tokens belong in the sequence."""
        path = selection.path
        depth = np.arange(path.shape[1])
        moved = (path != depth) & (depth < selection.num_accepted[:, None])
        index, depth = moved.nonzero()
        if index.size == 0:
            return
        rows, first = plan.rows[index], (plan.context + plan.num_new)[index]
        table, size = self.loop.table.block_table, self.loop.config.block_size

        def slots(place: LongArray) -> LongArray:
            return table[rows, place // size].astype(np.int64) * size + place % size

        self.runner.move_slots(slots(first + path[index, depth]), slots(first + depth))

    def _emit(self, plan: StepPlan, depths: IntArray, selection: Selection) -> tuple[IntArray, BoolArray]:
        """Append emitted tokens up to each row's end; int32 [R] how many, bool [R] which rows finished.

        ``depths`` int32 [R] are those of the rows' drafts.
        """
        table, rows, emitted = self.loop.table, plan.rows, selection.emitted
        left = table.num_left(rows)
        counts = np.where(plan.emits, np.minimum(selection.num_accepted + 1, left), 0).astype(np.int32)
        stops = np.isin(emitted, self._eos) & ~self.state.ignore_eos[rows, None]
        for index, job in self._watched_in(plan):
            stops[index] |= np.isin(emitted[index], job.params.stop_token_ids)
        stops &= np.arange(emitted.shape[1]) < counts[:, None]
        stopped = stops.any(axis=1)
        counts = np.where(stopped, np.argmax(stops, axis=1) + 1, counts).astype(np.int32)
        for index, job in self._watched_in(plan):
            if job.stream is not None and counts[index]:
                counts[index] = self._push_text(
                    job, emitted[index, : counts[index]].tolist(), bool(stopped[index])
                )
                stopped[index] |= job.stopped_by_text
            if index in selection.logprobs:
                job.logprobs.extend(selection.logprobs[index][: counts[index]])
        for index in np.flatnonzero(stopped).tolist():
            self._jobs[int(plan.request_ids[index])].finish_reason = "stop"
        self.state.append(rows, emitted, counts)
        self.state.count_positions(rows, depths, selection.num_accepted)
        return counts, stopped | (plan.emits & (counts == left))

    def _watched_in(self, plan: StepPlan) -> list[tuple[int, Job]]:
        """Rows that need Python of their own: streams, stop strings, stop tokens, logprobs."""
        if not self._watched:
            return []
        jobs = ((index, self._watched.get(row)) for index, row in enumerate(plan.rows.tolist()))
        return [(index, job) for index, job in jobs if job is not None]

    def _push_text(self, job: Job, tokens: list[int], ends_in_stop_token: bool) -> int:
        """Feed tokens to the text stream; how many of them count, fewer if a stop string ends the text."""
        assert job.stream is not None
        for place, token in enumerate(tokens):
            if ends_in_stop_token and place == len(tokens) - 1:
                break
            if job.stream.push(token):
                job.stopped_by_text = True
                return place + 1
        return len(tokens)

    def _hash_new_blocks(self, plan: StepPlan, counts: IntArray) -> tuple[LongArray, np.ndarray]:
        """Chained hashes of the blocks whose tokens became known: int64 [H] rows, uint64 [H] hashes."""
        rows_out: list[int] = []
        hashes_out: list[int] = []
        if self.loop.config.prefix_caching:
            size, known = self.loop.config.block_size, self.state.num_known[plan.rows]
            for index in np.flatnonzero(known // size != (known - counts) // size).tolist():
                row = int(plan.rows[index])
                have = self.loop.table.request(row).block_hashes
                tokens = self.state.known(row)[len(have) * size :]
                hashes = hash_blocks(tokens, size, have[-1] if have else 0)
                rows_out += [row] * len(hashes)
                hashes_out += hashes
        return np.array(rows_out, np.int64), np.array(hashes_out, np.uint64)

    def _commit(self, plan: StepPlan, outcome: StepOutcome) -> list[Job]:
        """Tell the listeners and the scheduler; the jobs that finished."""
        finished = [self._jobs[request_id] for request_id in plan.request_ids[outcome.finished].tolist()]
        for index, job in self._watched_in(plan):
            count, is_last = int(outcome.num_emitted[index]), bool(outcome.finished[index])
            if is_last and job.stream is not None:
                job.stream.finish(stopped_by_text=job.stopped_by_text)
            if job.on_token and count:
                tokens = self.state.known(job.row)[-count:].tolist()
                self._defer(partial(self._publish, job, tokens, is_last))
        self.loop.commit(plan, outcome, self.clock())
        for job in finished:
            self._leave(job)
            del self._jobs[job.request.request_id]
            if self.trace:
                positions = job.position_drafted.tolist(), job.position_accepted.tolist()
                size = self.loop.config.block_size
                record = RequestRecord.of(job.request, size, job.finish_reason, *positions)
                self._defer(partial(self.trace.request, record))
        return finished

    def _publish(self, job: Job, tokens: list[int], is_last: bool) -> None:
        assert job.on_token is not None and job.stream is not None
        job.on_token(
            StreamEvent(
                request_id=job.request.request_id,
                token_ids=tokens,
                text=job.stream.take(final=is_last),
                finish_reason=job.finish_reason if is_last else None,
            )
        )

    def _output(self, job: Job) -> RequestOutput:
        request, output = job.request, job.tokens[job.prompt.size :].tolist()
        ttft_s = request.first_token_s - request.arrival_s
        decode_s = request.finish_s - request.first_token_s
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=job.prompt.tolist(),
            token_ids=output,
            text=job.stream.text if job.stream else self.tokenizer.decode(output),
            finish_reason=job.finish_reason,
            num_drafted=request.num_drafted,
            num_accepted=request.num_accepted,
            num_steps=request.num_steps,
            num_cached=request.num_cached,
            num_preemptions=request.num_preemptions,
            ttft_s=ttft_s,
            tpot_s=decode_s / (len(output) - 1) if len(output) > 1 else math.nan,
            e2e_s=request.finish_s - request.arrival_s,
            logprobs=job.logprobs if job.params.logprobs is not None else None,
        )

    def abandon(self) -> None:
        """Give up what is unfinished, after an error or an interrupt, so that the engine stays usable."""
        for request_id in list(self._jobs):
            self.loop.cancel(request_id)
        self._jobs.clear()
        self._later.clear()
        self._watched.clear()
        self._swapped.clear()
        self._arrivals.clear()
