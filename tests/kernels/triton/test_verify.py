"""``verify``: the torch form against ``specdec.verify``, the kernels against the torch form, and the law of the output.

Masses over the vocabulary are float32 sums in the kernels, so a row could differ where a uniform lies very close to a
threshold. None of the 276 random rows changes if its uniforms are moved by 1e-5 either way, so none is left out.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from specdec_kernels.verify.reference import verify as reference
from torch import Tensor

from specdec.random import Stream, uniforms
from specdec.tree import Tree
from specdec.verify import TREE_RULES, verify_chains, verify_tree
from specdec.verify.tree_base import TreeDrafts
from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken
from tests.kernels.triton.drafts import LARGEST, Batch, differing, make_batch, random_tree, row_laws
from tests.verify.chi_square import excess, softmax
from tests.verify.tree_laws import SHAPES

from specdec_kernels.verify import decide, greedy, laws, sample  # isort: skip
from specdec_kernels.verify import triton as op  # isort: skip

SMALL = op.Config(block=8, tile=8, part=8)
"""Vocabularies of several pieces even where they are tiny."""


@pytest.fixture(autouse=True)
def cheap_device_functions(monkeypatch: pytest.MonkeyPatch):
    """The interpreter patches Triton's language anew for each device function that is called: once is enough."""
    from triton import language
    from triton.runtime import interpreter

    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", object)
    is_builtin = language.core.is_builtin

    def patch_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        return patch(function) if any(is_builtin(m.load) for m in modules) else scope()

    if runtime.IS_INTERPRETED and scope is not object:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": SMALL})


def check(rule: str, batch: Batch, device) -> None:
    outcome = op.verify(rule, *batch.to(device))
    assert [values.dtype for values in outcome] == [torch.int32, torch.int64, torch.int64]
    wrong = differing(outcome, reference(rule, *batch))
    assert not wrong.any(), (rule, np.flatnonzero(wrong))


ALL_TREES = [
    Tree(parents)
    for size in range(6)
    for parents in itertools.product(*(range(-1, node) for node in range(size)))
]


@pytest.mark.parametrize("seed", (0, 1))
def test_the_reference_decides_as_specdec_does_on_all_small_trees(seed):
    batch = make_batch(ALL_TREES, 7, seed)
    accepted_by_rule = {}
    for rule in ("recursive", "one_hot", "traversal"):
        accepted, path, next_token = (out.numpy() for out in reference(rule, *batch))
        for row, tree in enumerate(ALL_TREES):
            noise = np.append(batch.accept_uniforms[row, : len(tree)], batch.residual_uniforms[row])
            tokens = batch.tokens[row, : len(tree)].numpy()
            expected = verify_tree(rule, tree, tokens, *row_laws(batch, row), noise)
            assert (path[row, : accepted[row]].tolist(), next_token[row]) == expected, (rule, tree)
            assert not path[row, accepted[row] :].any()
        accepted_by_rule[rule] = accepted.sum()
    assert min(accepted_by_rule.values()) > len(ALL_TREES) / 2


def chain_batch(num_rows: int, width: int, vocab_size: int, seed: int) -> Batch:
    """Chains of all lengths up to ``width``, with the engine's noise."""
    batch = make_batch([Tree.chain(row % (width + 1)) for row in range(num_rows)], vocab_size, seed, True)
    seeds, counters = np.full(num_rows, seed, np.uint64), np.arange(num_rows)
    accept = uniforms(seeds, counters, Stream.ACCEPT, max(width, 1))[:, : batch.tokens.shape[1]]
    last = uniforms(seeds, counters, Stream.RESIDUAL, 1)[:, 0]
    return batch._replace(
        accept_uniforms=torch.from_numpy(accept.copy()), residual_uniforms=torch.from_numpy(last.copy())
    )


def padded(batch: Batch, probs: Tensor, starts: Tensor, width: int) -> np.ndarray:
    """[R, width, V] of a packed tensor, as the host's rules take it."""
    places = starts[:, None] + torch.minimum(torch.arange(width), batch.num_drafted[:, None])
    return probs[places].numpy()


@pytest.mark.parametrize("is_deterministic", (False, True))
@pytest.mark.parametrize("rule", ("token", "block"))
def test_the_reference_decides_as_specdec_does_on_chains(rule, is_deterministic):
    width, batch = 5, chain_batch(120, 5, 6, 3)
    assert batch.draft_probs is not None and batch.draft_start is not None
    draft = padded(batch, batch.draft_probs, batch.draft_start, width)
    accepted, next_token = verify_chains(
        rule,
        padded(batch, batch.target_probs, batch.logit_start, width + 1),
        None if is_deterministic else np.nan_to_num(draft, nan=1.0),
        batch.tokens.numpy(),
        batch.num_drafted.numpy(),
        batch.accept_uniforms.numpy(),
        batch.residual_uniforms.numpy(),
    )
    outcome = reference(rule, *(batch.deterministic() if is_deterministic else batch))
    assert np.array_equal(outcome[0], accepted) and np.array_equal(outcome[2], next_token)
    places = np.arange(width)
    assert np.array_equal(outcome[1], np.where(places < accepted[:, None], places, 0))
    assert set(accepted.tolist()) >= set(range(3 if is_deterministic else width))


@pytest.mark.parametrize("rule", ("recursive", "one_hot", "traversal"))
def test_small_trees(rule, device, small_pieces):
    check(rule, make_batch(SHAPES, 11, 4), device)


@pytest.mark.parametrize("vocab_size", (3, 1000))
@pytest.mark.parametrize("rule", ("recursive", "one_hot", "traversal"))
def test_larger_trees(rule, vocab_size, device, monkeypatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(block=128, tile=256)})
    rng = np.random.default_rng(vocab_size)
    trees = [random_tree(rng, size, min(vocab_size, 8)) for size in (64, 33, 0, 12)]
    check(rule, make_batch(trees, vocab_size, 5), device)


@pytest.mark.parametrize("is_deterministic", (False, True))
@pytest.mark.parametrize("rule", ("token", "block"))
def test_chains(rule, is_deterministic, device):
    batch = chain_batch(18, 16, 17, 6)
    check(rule, batch.deterministic() if is_deterministic else batch, device)


def test_a_whole_vocabulary_in_pieces_of_the_real_size(device):
    batch = chain_batch(3, 2, 9001, 7)
    for rule in ("token", "block"):
        check(rule, batch, device)


def test_thresholds_of_token_and_one_hot_are_the_hosts_bit_for_bit(device):
    probs = torch.tensor([[0.3, 0.7]] * 2)
    draft = torch.tensor([[0.8, 0.2]])
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
    for rule, q, ratio in (
        ("token", draft, float(probs[0, 0].double() / draft[0, 0].double())),
        ("one_hot", None, float(probs[0, 0])),
    ):
        noise = torch.tensor([[ratio], [np.nextafter(ratio, 0)]], dtype=torch.float64)
        starts = None if q is None else zero
        batch = Batch(zero[:, None], None, one, zero, probs, q, starts, noise, noise[:, 0])
        assert op.verify(rule, *batch.to(device))[0].tolist() == [0, 1]


@pytest.mark.parametrize("uniform", (0.0, LARGEST))
@pytest.mark.parametrize("probs", ([0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0]), ids=str)
def test_tokens_of_probability_zero_are_never_drawn(probs, uniform, device, monkeypatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(tile=2)})
    none, zero, noise = torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), torch.tensor([uniform]).double()
    batch = Batch(
        none.long(), None, zero.int(), zero, torch.tensor([probs]), None, None, none.double(), noise
    )
    accepted, path, token = op.verify("one_hot", *batch.to(device))
    places = np.flatnonzero(probs)
    assert token.item() == places[0 if uniform == 0 else -1]
    assert accepted.tolist() == [0] and path.shape == (1, 0)


def test_laws_that_differ_by_rounding_reject_into_the_target(device):
    """A child is rejected although the target exceeds the draft nowhere; then its sibling, by what is left of both."""
    draft = torch.tensor([[0.5, 0.25, 0.25]])
    target = draft.clone()
    target[0, :2] *= 1 - 2**-23
    largest = torch.full((1, 2), LARGEST, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    for num_drafted, token in ((1, 1), (2, 0)):
        batch = Batch(
            torch.tensor([[0, 1]]),
            torch.tensor([[-1, -1]], dtype=torch.int32),
            zero.int() + num_drafted,
            zero,
            target.expand(3, 3),
            draft.expand(3, 3),
            zero,
            largest,
            torch.tensor([0.6]).double(),
        )
        for rule in ("recursive", "traversal"):
            outcome = op.verify(rule, *batch.to(device))
            assert not differing(outcome, reference(rule, *batch)).any()
            assert outcome[0].tolist() == [0] and outcome[2].tolist() == [token]


def test_input_of_no_use_gives_no_token(device):
    """Rows of token −1: one that emits nothing, and those for which the host's rules raise."""
    batch = make_batch([Tree([-1, -1, 0])] * 7, 6, 8)
    target, draft, starts = batch.target_probs, batch.draft_probs, batch.logit_start.clone()
    starts[0] = -1
    target[starts[1] : starts[1] + 4, 2] = torch.nan
    target[starts[2]] = 0
    batch.tokens[3, 2] = 6
    batch.tokens[4, 0] = -1
    assert draft is not None and batch.draft_start is not None
    draft[batch.draft_start[5], batch.tokens[5, 1]] = 0
    batch = batch._replace(logit_start=starts, accept_uniforms=torch.full((7, 3), LARGEST).double())
    for rule in ("recursive", "traversal"):
        expected = reference(rule, *batch)[2]
        assert expected[:6].tolist() == [-1] * 6 and expected[6] >= 0
        assert op.verify(rule, *batch.to(device))[2].tolist() == expected.tolist()


def test_nothing_to_verify(device):
    batch = make_batch([Tree([])], 5, 9)
    laws_of_rows = ("target_probs", "draft_probs")
    emptied: Any = {name: getattr(batch, name)[:0] for name in Batch._fields if name not in laws_of_rows}
    empty = batch._replace(**emptied)
    for rule in ("recursive", "one_hot", "traversal"):
        check(rule, batch, device)
        assert [len(out) for out in op.verify(rule, *empty.to(device))] == [0, 0, 0]


def test_rules_say_what_they_need():
    batch = make_batch([Tree([-1])], 5, 9)
    for rule, changed, remedy in (
        ("tokne", batch, "use one of"),
        ("token", batch, "trees"),
        ("traversal", batch.deterministic(), "one_hot"),
        ("recursive", batch._replace(draft_start=None), "both or neither"),
    ):
        for verify in (op.verify, reference):
            with pytest.raises(ValueError, match=remedy):
                verify(rule, *changed)


def emitted_law(verify, device, num_rows: int) -> float:
    """Standard deviations by which chi-square of the first two tokens exceeds its mean, for chains of one draft."""
    rng = np.random.default_rng(11)
    target, draft = softmax(rng.standard_normal((5, 4)) * 2.5), softmax(rng.standard_normal(4) * 2.5)
    tokens = rng.choice(4, num_rows, p=draft.astype(np.float64) / draft.sum(dtype=np.float64))
    # The law after the draft depends on it: row 0 is the root's, row x + 1 that after token x.
    laws_of_rows = np.stack([np.broadcast_to(target[0], (num_rows, 4)), target[tokens + 1]], 1).reshape(-1, 4)
    rows = torch.arange(num_rows)
    batch = Batch(
        torch.from_numpy(tokens)[:, None],
        None,
        torch.ones(num_rows, dtype=torch.int32),
        2 * rows,
        torch.from_numpy(laws_of_rows),
        torch.from_numpy(draft)[None],
        0 * rows,
        torch.from_numpy(rng.random((num_rows, 1))),
        torch.from_numpy(rng.random(num_rows)),
    )
    accepted, _, next_token = verify("token", *batch.to(device))
    accepted, next_token = accepted.cpu().numpy() > 0, next_token.cpu().numpy()
    first = np.where(accepted, tokens, next_token)
    plain = (target[first + 1].cumsum(1) < rng.random((num_rows, 1))).sum(1).clip(max=3)
    second = np.where(accepted, next_token, plain)
    return excess(first * 4 + second, (target[0][:, None] * target[1:]).ravel().astype(np.float64))


NUM_TRIALS = 160 if runtime.IS_INTERPRETED else 200_000


def test_the_joint_law_of_the_output_is_the_targets(device):
    assert emitted_law(op.verify, device, NUM_TRIALS) < 4


def test_another_law_is_noticed(device):
    copy = broken_copy(laws, "-share * draft", "0.0 * draft")
    assert emitted_law(copy.verify, device, NUM_TRIALS) > 10


def broken_copy(module: ModuleType, old: str, new: str) -> Any:
    """A copy of the op with a broken ``module`` of its own."""
    same = '"""'
    parts: dict[str, Any] = {part.__name__: broken(part, same, same) for part in (decide, sample, greedy)}
    changed: Any = broken(module, old, new)
    if module is laws:
        parts[decide.__name__].reject, parts[decide.__name__].entry_of = changed.reject, changed.entry_of
        parts[sample.__name__].law_tile = changed.law_tile
    else:
        parts[module.__name__] = changed
    copy: Any = broken(op, same, same)
    for name, part in parts.items():
        setattr(copy, name.rpartition(".")[2], part)
    copy.CONFIGS = {"default": SMALL}
    return copy


BREAKS: dict[str, Any] = {
    "first child": ("recursive", decide, "entry == above, other, first", "entry == above, above, first"),
    "siblings": ("recursive", decide, "(entry < other), other", "(entry < other), 0"),
    "draft's mass": ("recursive", decide, "draft_sum = rest\n", "draft_sum = one\n"),
    "reset": ("recursive", decide, "            target_sum = one\n            draft_sum = one\n", ""),
    "path": ("recursive", decide, "entry == num_accepted, child - 1", "entry == num_accepted, child"),
    "left over": ("one_hot", decide, "target_sum -= target", "target_sum -= 0.0 * target"),
    "hope": ("traversal", decide, "(child == 0) & (uniform >= ratio)", "(child == 0)"),
    "ratio": ("traversal", decide, "both = mass + 1.0 - ratio", "both = mass + 1.0"),
    "scale": ("traversal", decide, "scale = ratio * draft_sum", "scale = draft_sum"),
    "rejected": ("recursive", laws, "draft = tl.where(column == token, 0.0, draft)", "draft = draft"),
    "vocabulary": ("one_hot", laws, "weights = tl.where(column == token, 0.0, weights)", "weights = weights"),
    "law's row": ("recursive", sample, "draft_start_ptr + row) + last", "draft_start_ptr + row)"),
    "tile": ("recursive", sample, "goal - below", "goal"),
}


BRANCHING = [Tree([-1] * 5)] * 2 + [Tree([-1, 0, 0, -1, 3, 0])] * 4 + [Tree([-1, -1, 1, 1, 2, 2])] * 4


def sensitive_batch(
    rule: str, seed: int, trees: list[Tree] = BRANCHING, distance: float = 1.5, margin: float = 0.01
) -> Batch:
    """Flat laws, and uniforms on either side of the thresholds."""
    batch = make_batch(trees, 11, seed, scales=(0.5,), distances=(distance,), has_zeros=distance > 0.1)
    noise, rng = batch.accept_uniforms.clone(), np.random.default_rng(seed)
    for row, tree in enumerate(trees):
        tokens, (target, draft) = batch.tokens[row, : len(tree)], row_laws(batch, row)
        drafts = TreeDrafts.build(tree, tokens.numpy()[None], target[None], draft[None])
        close = TREE_RULES[rule].thresholds(drafts)[0] + rng.choice([margin, -margin], len(tree))
        noise[row, : len(tree)] = torch.from_numpy(close).clamp(0, LARGEST)
    return batch._replace(accept_uniforms=noise)


SENSITIVE_SEED = 63


@pytest.fixture(scope="module")
def sensitive() -> dict[str, tuple[Batch, tuple[Tensor, Tensor, Tensor]]]:
    batches = {rule: sensitive_batch(rule, SENSITIVE_SEED) for rule in TREE_RULES}
    return {rule: (batch, reference(rule, *batch)) for rule, batch in batches.items()}


def test_laws_that_hardly_differ_have_precise_residuals(device):
    """Masses of 1e-5 in thresholds that are met within 3e-5, behind a rejected leaf: a float32 scale would not do."""
    from triton.runtime import interpreter

    if runtime.IS_INTERPRETED and not hasattr(interpreter._interpreter, "fma_fp32"):
        pytest.skip("this version's interpreter rounds a product before it is added to")
    batch = sensitive_batch("traversal", 1, [Tree.chain(2)] * 16, distance=1e-5, margin=3e-5)
    batch.accept_uniforms[:, 1] = LARGEST
    expected = reference("traversal", *batch)
    assert not differing(op.verify("traversal", *batch.to(device)), expected).any()
    copy = broken_copy(laws, "low = (scale - high.to(tl.float64)).to(tl.float32)", "low = 0.0 * high")
    assert differing(copy.verify("traversal", *batch.to(device)), expected).any()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_noticed(name, device, sensitive):
    rule, *change = BREAKS[name]
    batch, expected = sensitive[rule]
    assert differing(broken_copy(*change).verify(rule, *batch.to(device)), expected).any()


def test_the_batch_that_notices_is_fine_itself(device, sensitive, small_pieces):
    for rule, (batch, expected) in sensitive.items():
        assert not differing(op.verify(rule, *batch.to(device)), expected).any()
