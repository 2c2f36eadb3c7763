"""The C++ decoder against its reference, and against itself: a token's logits never depend on its company."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from specdec_kernels.cpu_decoder import (
    CpuDecoder,
    build,
    bytes_per_block,
    is_available,
    supports,
    top,
    top_log_probs,
)
from specdec_kernels.cpu_decoder.reference import reference_forward
from specdec_kernels.tolerances import LOGITS, scaled_error
from torch import Tensor

from tests.kernels.native import (
    CASES,
    FLAVOURS,
    MAX_LEN,
    Model,
    Session,
    make_spec,
    make_weights,
    random_tokens,
)

AVAILABLE, REASON = is_available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"native decoder: {REASON}")


def test_logits_match_the_reference(model: Model) -> None:
    sequences = {row: random_tokens(model.spec, length, row) for row, length in enumerate((45, 1, 123, 16))}
    for tokens, actual in zip(
        sequences.values(), Session(model.decoder, len(sequences)).step(sequences), strict=True
    ):
        expected, _ = model.reference(tokens)
        assert scaled_error(actual, expected) <= LOGITS[model.dtype]


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("windows", dict(sliding_window=(38, None))),
        ("windows", dict(sliding_window=(36, None))),
        ("llama", dict(activation="gelu_tanh")),
        ("llama", dict(attention_scale=0.2)),
        ("llama", dict(inv_freq=make_spec().inv_freq[::-1])),
        ("gemma", dict(logit_softcap=None)),
        ("gemma", dict(embedding_scale=7.0)),
        ("gemma", dict(norm_offset=0.8)),
        ("gemma", dict(post_norms=False)),
    ],
)
def test_the_tolerance_notices_a_wrong_model(case: str, change: dict) -> None:
    model = Model(case, FLAVOURS[0])
    tokens = random_tokens(model.spec, 123)
    wrong, _ = reference_forward(replace(model.spec, **change), model.weights, torch.tensor(tokens))
    assert scaled_error(model.alone(tokens), wrong) > 2 * max(LOGITS.values())


def test_huge_numbers_saturate(model: Model) -> None:
    """Where exp overflows, an activation is its input or zero, and a capped logit the cap."""
    weights = {name: w * 1000 if name.endswith("gate") else w for name, w in model.weights.items()}
    tokens = random_tokens(model.spec, 40)
    actual = Session(CpuDecoder(model.spec, weights, model.flavour)).step({0: tokens})[0]
    expected, _ = reference_forward(model.spec, weights, torch.tensor(tokens), activation_dtype=model.dtype)
    assert scaled_error(actual, expected) <= LOGITS[model.dtype]
    if model.spec.logit_softcap:
        weights["final_norm"] = model.weights["final_norm"] * 1e6
        capped = Session(CpuDecoder(model.spec, weights, model.flavour)).step({0: tokens})[0]
        assert capped.abs().eq(model.spec.logit_softcap).float().mean() > 0.99


@pytest.mark.parametrize("option", ["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"])
def test_every_optional_weight_counts(option: str) -> None:
    """``k_bias`` alone shifts all scores of a query alike before the rotation, hence the small bound."""
    model = Model("ratio_1_biases" if "bias" in option else "qk_norm_untied", FLAVOURS[0])
    tokens = random_tokens(model.spec, 60)
    fill = torch.zeros_like if "bias" in option else torch.ones_like
    changed = {name: fill(w) if name.endswith(option) else w for name, w in model.weights.items()}
    wrong, _ = reference_forward(model.spec, changed, torch.tensor(tokens))
    assert scaled_error(model.alone(tokens), wrong) > 2 * max(LOGITS.values())


def random_schedule(rng: np.random.Generator, lengths: Sequence[int]) -> Iterator[dict[int, tuple[int, int]]]:
    """Steps of {row: (start, end)} until every row is done: some rows wait, chunks vary, rows change places."""
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        rows = [int(row) for row in rng.permutation(len(lengths)) if done[row] < lengths[row]]
        chosen = [row for row in rows if rng.random() < 0.7] or rows[:1]
        step = {}
        for row in chosen:
            size = int(rng.choice([1, 1, 2, 5, 16, 17, 40, 100]))
            step[row] = (done[row], min(done[row] + size, lengths[row]))
            done[row] = step[row][1]
        yield step


@pytest.mark.parametrize("seed", range(4))
def test_batching_chunking_and_paging_change_no_bit(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 150, size=5)]
    sequences = [random_tokens(model.spec, length, row) for row, length in enumerate(lengths)]
    session = Session(model.decoder, 5, 150, block_size=int(rng.choice([16, 32, 48])), seed=seed)
    pieces: list[list[Tensor]] = [[] for _ in lengths]
    for step in random_schedule(rng, lengths):
        outputs = session.step({row: sequences[row][start:end] for row, (start, end) in step.items()})
        for row, logits in zip(step, outputs, strict=True):
            pieces[row].append(logits)
    for tokens, parts in zip(sequences, pieces, strict=True):
        assert torch.equal(torch.cat(parts), model.alone(tokens))


def test_decoding_equals_prefill_over_a_long_context(model: Model) -> None:
    tokens = random_tokens(model.spec, MAX_LEN - 5)
    expected, session = model.alone(tokens), Session(model.decoder)
    session.step({0: tokens[:664]})
    decoded = [session.step({0: [token]})[0] for token in tokens[664:]]
    assert torch.equal(torch.cat(decoded), expected[664:])


def test_the_number_of_threads_changes_no_bit(model: Model) -> None:
    sequences = {row: random_tokens(model.spec, length, row) for row, length in enumerate((37, 1, 18))}
    more = {2: [3], 0: [5, 6, 7], 1: [4]}
    outputs = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            session = Session(model.decoder, len(sequences), 64)
            outputs[threads] = torch.cat([*session.step(sequences), *session.step(more)])
        finally:
            torch.set_num_threads(1)
    assert torch.equal(outputs[1], outputs[2])


def test_verification_equals_decoding(model: Model) -> None:
    """The drafts of one row are checked in one step, beside a row that decodes and one that prefills."""
    tokens, others = random_tokens(model.spec, 41), random_tokens(model.spec, 30, seed=1)
    decoding, verifying = Session(model.decoder), Session(model.decoder, 3, 64, seed=5)
    decoding.step({0: tokens[:33]})
    decoded = torch.cat([decoding.step({0: [token]})[0] for token in tokens[33:]])
    verifying.step({2: tokens[:33], 0: others[:9]})
    verified = verifying.step({1: others, 2: tokens[33:], 0: others[9:10]})[1]
    assert torch.equal(verified, decoded)


def test_wide_steps_change_no_bit(llama: Model) -> None:
    """More rows than a block of rows holds, decoding together: every one as if it were alone."""
    num_rows = 37
    sequences = [random_tokens(llama.spec, 20 + row, row) for row in range(num_rows)]
    session = Session(llama.decoder, num_rows, 64)
    session.step({row: tokens[:-1] for row, tokens in enumerate(sequences)})
    outputs = session.step({row: tokens[-1:] for row, tokens in enumerate(sequences)})
    for tokens, logits in zip(sequences, outputs, strict=True):
        assert torch.equal(logits[0], llama.alone(tokens)[-1])


def test_unwritten_memory_does_not_leak(model: Model) -> None:
    """NaN in every slot that has not been written, in the blocks of the request itself too."""
    tokens = random_tokens(model.spec, 70)
    session = Session(model.decoder, 2, 80, block_size=32)
    session.poison()
    parts = [session.step({0: tokens[start : start + 7]})[0] for start in range(0, 70, 7)]
    assert torch.equal(torch.cat(parts), model.alone(tokens))


def test_rejected_drafts_leave_no_trace(model: Model) -> None:
    tokens = random_tokens(model.spec, 50)
    expected, session = model.alone(tokens), Session(model.decoder)
    session.step({0: tokens[:20]})
    for start in range(20, 50, 3):
        wrong = random_tokens(model.spec, 6, seed=start)
        verified = session.step({0: [tokens[start], *wrong]})[0]
        assert torch.equal(verified[0], expected[start])
        session.lengths[0] = start + 1
        accepted = session.step({0: tokens[start + 1 : start + 3]})[0]
        assert torch.equal(accepted, expected[start + 1 : start + 3])


def test_a_subset_of_layers(model: Model) -> None:
    tokens = random_tokens(model.spec, 40)
    session = Session(model.decoder)
    actual = session.step({0: tokens}, layers=[1])[0]
    expected, _ = model.reference(tokens, layers=[1])
    assert scaled_error(actual, expected) <= LOGITS[model.dtype]
    assert not session.cache.k[0].any() and session.cache.k[1].any()


def test_a_subset_of_layers_equals_a_model_of_these_layers(model: Model) -> None:
    tokens = random_tokens(model.spec, 40)
    small = replace(
        model.spec,
        num_layers=1,
        sliding_window=model.spec.sliding_window[1:],
        inv_freq=model.spec.inv_freq[1:],
    )
    kept = {name: w for name, w in model.weights.items() if not name.startswith("layers.0.")}
    kept = {name.replace("layers.1.", "layers.0."): w for name, w in kept.items()}
    expected = Session(CpuDecoder(small, kept, model.flavour)).step({0: tokens})[0]
    assert torch.equal(Session(model.decoder).step({0: tokens}, layers=[1])[0], expected)


def test_captured_residual_stream(model: Model) -> None:
    tokens = random_tokens(model.spec, 40)
    captured = torch.full((2, 40, model.spec.hidden_size), torch.nan)
    Session(model.decoder).step({0: tokens}, capture=(1, 0), captured=captured)
    _, residuals = model.reference(tokens)
    for actual, layer in zip(captured, (1, 0), strict=True):
        assert scaled_error(actual, residuals[layer]) <= LOGITS[model.dtype]


def prefill(
    decoder: CpuDecoder, token_ids: Sequence[int], logit_rows: Sequence[int], num_blocks: int
) -> Tensor:
    """One sequence in blocks 0, 1, ... of a cache of its own."""
    length, table = len(token_ids), np.arange(num_blocks, dtype=np.int32)[None]
    return decoder.forward(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.arange(length),
        query_start=np.array([0, length], dtype=np.int32),
        context_lens=np.zeros(1, dtype=np.int32),
        block_tables=table,
        slot_mapping=np.arange(length),
        logit_rows=np.array(logit_rows, dtype=np.int64),
        kv_cache=decoder.new_kv_cache(4, 16),
    )


@pytest.mark.parametrize("chosen", [[29], [7, 3, 7], []])
def test_chosen_logit_rows(llama: Model, chosen: list[int]) -> None:
    tokens = random_tokens(llama.spec, 30)
    assert torch.equal(prefill(llama.decoder, tokens, chosen, num_blocks=2), llama.alone(tokens)[chosen])


def test_a_step_without_tokens(llama: Model) -> None:
    assert prefill(llama.decoder, [], [], num_blocks=2).shape == (0, llama.spec.vocab_size)


def test_copied_blocks_continue_the_sequence(llama: Model) -> None:
    """Blocks that swap contents in one call: every source is read before it is overwritten."""
    tokens = random_tokens(llama.spec, 40)
    session = Session(llama.decoder, 1, 48)
    session.step({0: tokens[:32]})
    first, second = session.block_tables[0, :2].copy()
    session.cache.copy_blocks(np.array([first, second]), np.array([second, first]))
    session.block_tables[0, :2] = second, first
    assert torch.equal(session.step({0: tokens[32:]})[0], llama.alone(tokens)[32:])


def test_nan_reaches_its_own_row_only(llama: Model) -> None:
    weights = {name: w.clone() for name, w in llama.weights.items()}
    weights["lm_head"] = weights["embed"].clone()
    weights["embed"][7] = torch.nan
    decoder = CpuDecoder(llama.spec, weights)
    healthy = [token for token in random_tokens(llama.spec, 30) if token != 7]
    poisoned, clean = Session(decoder, 2).step({0: [3, 7, 3], 1: healthy})
    assert poisoned[1:].isnan().all()
    assert torch.equal(clean, llama.alone(healthy))


def test_nan_in_a_matrix_reaches_the_logits(llama: Model) -> None:
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        weights = {key: w.clone() for key, w in llama.weights.items()}
        weights[f"layers.0.{name}"][3, 5] = torch.nan
        logits = Session(CpuDecoder(llama.spec, weights)).step({0: [1, 2, 3]})[0]
        assert logits[-1].isnan().all(), name


@pytest.mark.parametrize("case", ["ratio_1_biases", "qk_norm_untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_copied(case: str, dtype: torch.dtype) -> None:
    spec = make_spec(**CASES[case][0])
    weights = {name: w.to(dtype, copy=True) for name, w in make_weights(spec, CASES[case][1]).items()}
    decoder, tokens = CpuDecoder(spec, weights), random_tokens(spec, 20)
    before = Session(decoder).step({0: tokens})[0]
    for weight in weights.values():
        weight.fill_(torch.nan)
    assert torch.equal(Session(decoder).step({0: tokens})[0], before)


def test_one_openmp_runtime() -> None:
    """Two thread pools on the same cores would starve each other."""
    script = (
        "import re, pathlib, torch; from specdec_kernels.cpu_decoder import build; build.library();"
        "maps = pathlib.Path('/proc/self/maps').read_text();"
        r"print(len(set(re.findall(r'\S*/lib(?:g|i)?omp\S*', maps))))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


def test_unsupported_shapes_say_why() -> None:
    assert supports(make_spec()) == (True, "")
    assert supports(make_spec(hidden_size=48))[1] == "hidden_size=48 is not a multiple of 32"
    assert not supports(make_spec(num_heads=34, num_kv_heads=2))[0]
    with pytest.raises(ValueError, match="head_dim=16"):
        CpuDecoder(make_spec(head_dim=16), {})


def test_memory_of_a_block(llama: Model) -> None:
    cache = llama.decoder.new_kv_cache(3, 32)
    assert sum(t[0].nbytes for t in (*cache.k, *cache.v)) == bytes_per_block(llama.spec, 32)
    with pytest.raises(ValueError, match="block_size=8"):
        llama.decoder.new_kv_cache(3, 8)


@pytest.mark.parametrize("token", [-1, 200])
def test_a_token_outside_the_vocabulary_is_caught(llama: Model, token: int) -> None:
    with pytest.raises(AssertionError, match="vocabulary"):
        Session(llama.decoder).step({0: [token]})


def test_a_context_beyond_its_block_table_is_caught(llama: Model) -> None:
    with pytest.raises(AssertionError, match="block table is too short"):
        prefill(llama.decoder, range(33), [0], num_blocks=2)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("size", "k"), [(8, 8), (49, 3), (4096, 8), (49152, 64)])
def test_top_is_topk_and_takes_the_first_of_equals(size: int, k: int, flavour: str):
    values = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    assert torch.equal(top(values, k, flavour), values.topk(k).indices)
    tied = (values * 4).round()
    expected = torch.sort(tied, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top(tied, k, flavour), expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("size", [8, 49, 8192])
def test_top_knows_log_probabilities(size: int, flavour: str):
    logits = 10.0 * torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    logits[1, 3:] = float("-inf")
    places, log_probs = top_log_probs(logits, 5, flavour)
    assert torch.equal(places, top(logits, 5, flavour))
    expected = logits.double().log_softmax(-1).gather(1, places.clamp_min(0))
    expected[places < 0] = float("-inf")
    assert places[1].tolist()[3:] == [-1, -1]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_top_leaves_out_what_is_no_number(flavour: str):
    values = torch.full((2, 40), float("-inf"))
    values[0, 3], values[0, 17], values[0, 35] = float("nan"), 1.0, 2.0
    assert top(values, 3, flavour).tolist() == [[35, 17, -1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (build.AMX.keys() | {"sse2"}, ["amx", "avx512", "avx2"]),
        (build.AVX512.keys(), ["avx512", "avx2"]),
        (build.AVX2.keys() | {"avx512f"}, ["avx2"]),
        ({"avx2"}, []),
    ],
)
def test_a_cpu_gets_the_flavours_it_can_run(
    flags: set[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags))
    assert build.native_flavours() == expected
    if not expected:
        assert is_available.__wrapped__() == (False, "the CPU lacks fma")


def test_a_build_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = subprocess.run

    def recorded(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(build.subprocess, "run", recorded)
    assert build._build(FLAVOURS[0]) == build._build(FLAVOURS[0])
    assert [command[1:] for command in commands] == [["--version"], ["--version"]]


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.CalledProcessError):
        build._build(FLAVOURS[0])
