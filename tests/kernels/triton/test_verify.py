"""``verify``: the torch form against ``specdec.verify``, the kernels against the torch form, and the law of the output.

Masses over the vocabulary are float32 sums in the kernels. So a row may differ where a uniform lies within 1e-5 of a
threshold: rows whose outcome changes if all uniforms are moved that far either way are left out. With these seeds that
is 1 of the 1,000 or so rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from specdec_kernels.verify.reference import verify as reference
from specdec_kernels.verify.reference import verify_greedy as reference_greedy
from torch import Tensor

from specdec.random import Stream, uniforms
from specdec.tree import Tree
from specdec.verify import verify_chains, verify_greedy_trees, verify_tree, verify_trees
from tests.kernels.triton import runtime
from tests.kernels.triton.broken import broken
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

    patch, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    is_builtin = language.core.is_builtin

    def patch_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        return patch(function) if any(is_builtin(m.load) for m in modules) else scope()

    if runtime.IS_INTERPRETED and scope is not None:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": SMALL})


@dataclass(frozen=True)
class Batch:
    """Drafts of several rows, as ``verify`` takes them, but for the rule."""

    tokens: Tensor
    parents: Tensor | None
    num_drafted: Tensor
    logit_start: Tensor
    target_probs: Tensor
    draft_probs: Tensor | None
    draft_start: Tensor | None
    accept_uniforms: Tensor
    residual_uniforms: Tensor

    def args(self, device: torch.device | str = "cpu") -> list[Tensor | None]:
        return [None if value is None else value.to(device) for value in vars_of(self)]

    def moved(self, by: float) -> Batch:
        """All uniforms moved."""
        shifted = [(u + by).clamp(0, 1 - 2**-24) for u in (self.accept_uniforms, self.residual_uniforms)]
        return replace(self, accept_uniforms=shifted[0], residual_uniforms=shifted[1])

    def deterministic(self) -> Batch:
        return replace(self, draft_probs=None, draft_start=None)


def vars_of(batch: Batch) -> list[Tensor | None]:
    return [getattr(batch, name) for name in batch.__dataclass_fields__]


def make_batch(
    trees: list[Tree], vocab_size: int, seed: int, is_chain: bool = False, scales: Sequence[float] = (0.3, 1.5, 5.0)
) -> Batch:
    """Flat and peaked laws, by ``scales``, some tokens impossible; children drawn from the draft without replacement.

    What must not be read is NaN, or no token: gaps between rows, draft laws of leaves, tokens past a row's drafts.
    """
    rng = np.random.default_rng(seed)
    width = max(map(len, trees))
    tokens = np.full((len(trees), width), 10**9)
    parents = np.full((len(trees), width), -7, np.int32)
    target_rows, draft_rows, starts = [np.full(vocab_size, np.nan)], [np.full(vocab_size, np.nan)], []
    for row, tree in enumerate(trees):
        starts.append((len(target_rows), len(draft_rows)))
        parents[row, : len(tree)] = tree.parents
        for children in tree.children:
            logits = rng.standard_normal(vocab_size) * rng.choice(scales)
            noisy = logits + rng.standard_normal(vocab_size) * rng.choice([0.05, 0.5, 2.0])
            zeros = rng.permutation(vocab_size)[: rng.integers(0, vocab_size - max(len(children), 1) + 1)]
            # Impossible under both laws, but for one token under the target only and one under the draft only.
            logits[zeros[1:]], noisy[zeros[:1]], noisy[zeros[2:]] = -np.inf, -np.inf, -np.inf
            target_rows.append(softmax(logits))
            draft_rows.append(softmax(noisy) if children else np.full(vocab_size, np.nan))
            keys = np.where(draft_rows[-1] > 0, noisy + rng.gumbel(size=vocab_size), -np.inf)
            tokens[row, list(children)] = np.argsort(-keys)[: len(children)]
        target_rows.append(np.full(vocab_size, np.nan))
    return Batch(
        torch.from_numpy(tokens),
        None if is_chain else torch.from_numpy(parents),
        torch.tensor([len(tree) for tree in trees], dtype=torch.int32),
        torch.tensor([start for start, _ in starts]),
        torch.from_numpy(np.array(target_rows, np.float32)),
        torch.from_numpy(np.array(draft_rows, np.float32)),
        torch.tensor([start for _, start in starts]),
        torch.from_numpy(rng.random((len(trees), width))),
        torch.from_numpy(rng.random(len(trees))),
    )


def random_tree(rng: np.random.Generator, size: int, max_children: int) -> Tree:
    """Deep or wide, of no more children than a vocabulary has room for."""
    reach, parents = int(rng.integers(1, 12)), []
    while len(parents) < size:
        parent = int(rng.integers(max(-1, len(parents) - reach), len(parents)))
        if parents.count(parent) < max_children:
            parents.append(parent)
    return Tree(parents)


def differing(outcome, expected) -> np.ndarray:
    """Rows in which any of num_accepted, the path or the next token differs."""
    pairs = [(a.cpu().flatten(1) if a.ndim > 1 else a.cpu()[:, None], b) for a, b in zip(outcome, expected, strict=True)]
    return torch.stack([(a != b.reshape(a.shape)).any(1) for a, b in pairs]).any(0).numpy()


def check(rule: str, batch: Batch, device, module: ModuleType = op) -> None:
    """Rows that are clear of thresholds agree with the reference, and few rows are not."""
    expected = reference(rule, *batch.args())
    outcome = module.verify(rule, *batch.args(device))
    assert [a.dtype for a in outcome] == [torch.int32, torch.int64, torch.int64]
    unclear = np.zeros(len(expected[0]), np.bool_)
    for shift in (1e-5, -1e-5):
        unclear |= differing(reference(rule, *batch.moved(shift).args()), expected)
    wrong = differing(outcome, expected)
    assert not (wrong & ~unclear).any(), (rule, np.flatnonzero(wrong & ~unclear))
    assert unclear.sum() <= 1


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
        accepted, path, next_token = (out.numpy() for out in reference(rule, *batch.args()))
        for row, tree in enumerate(ALL_TREES):
            part = slice(int(batch.logit_start[row]), int(batch.logit_start[row]) + len(tree) + 1)
            draft = slice(int(batch.draft_start[row]), int(batch.draft_start[row]) + len(tree) + 1)
            noise = np.append(batch.accept_uniforms[row, : len(tree)], batch.residual_uniforms[row])
            expected = verify_tree(
                rule,
                tree,
                batch.tokens[row, : len(tree)].numpy(),
                batch.target_probs[part].numpy(),
                batch.draft_probs[draft].numpy(),
                noise,
            )
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
    return replace(
        batch, accept_uniforms=torch.from_numpy(accept.copy()), residual_uniforms=torch.from_numpy(last.copy())
    )


def padded(batch: Batch, probs: Tensor, starts: Tensor, width: int) -> np.ndarray:
    """[R, width, V] of a packed tensor, as the host's rules take it."""
    places = starts[:, None] + torch.minimum(torch.arange(width), batch.num_drafted[:, None])
    return probs[places].numpy()


@pytest.mark.parametrize("is_deterministic", (False, True))
@pytest.mark.parametrize("rule", ("token", "block"))
def test_the_reference_decides_as_specdec_does_on_chains(rule, is_deterministic):
    width, batch = 5, chain_batch(120, 5, 6, 3)
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
    outcome = reference(rule, *(batch.deterministic() if is_deterministic else batch).args())
    assert np.array_equal(outcome[0], accepted) and np.array_equal(outcome[2], next_token)
    places = np.arange(width)
    assert np.array_equal(outcome[1], np.where(places < accepted[:, None], places, 0))
    assert set(accepted.tolist()) >= set(range(width))


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
        args = (zero[:, None], None, one, zero, probs, q, None if q is None else zero, noise, noise[:, 0])
        outcome = op.verify(rule, *(None if a is None else a.to(device) for a in args))
        assert outcome[0].tolist() == [0, 1]


@pytest.mark.parametrize("uniform", (0.0, 1 - 2**-24))
@pytest.mark.parametrize("probs", ([0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0]), ids=str)
def test_tokens_of_probability_zero_are_never_drawn(probs, uniform, device, monkeypatch):
    monkeypatch.setattr(op, "CONFIGS", {"default": op.Config(tile=2)})
    none = torch.zeros(1, 0)
    zero = torch.zeros(1, dtype=torch.int64)
    args = (none.long(), None, zero.int(), zero, torch.tensor([probs]), None, None, none.double())
    accepted, path, token = op.verify(
        "one_hot", *(None if a is None else a.to(device) for a in args), torch.tensor([uniform]).double().to(device)
    )
    places = np.flatnonzero(probs)
    assert token.item() == places[0 if uniform == 0 else -1]
    assert accepted.tolist() == [0] and path.shape == (1, 0)


def test_laws_that_differ_by_rounding_reject_into_the_target(device):
    """A child is rejected although the target exceeds the draft nowhere; then its sibling, by what is left of both."""
    draft = torch.tensor([[0.5, 0.25, 0.25]])
    target = draft.clone()
    target[0, :2] *= 1 - 2**-23
    largest = torch.full((1, 2), 1 - 2**-24, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    for num_drafted, token in ((1, 1), (2, 0)):
        args = [
            torch.tensor([[0, 1]]),
            torch.tensor([[-1, -1]], dtype=torch.int32),
            zero.int() + num_drafted,
            zero,
            target.expand(3, 3),
            draft.expand(3, 3),
            zero,
            largest,
            torch.tensor([0.6]).double(),
        ]
        for rule in ("recursive", "traversal"):
            outcome = op.verify(rule, *(a.to(device) for a in args))
            assert not differing(outcome, reference(rule, *args)).any()
            assert outcome[0].tolist() == [0] and outcome[2].tolist() == [token]


def test_input_of_no_use_gives_no_token(device):
    """Rows of token −1: one that emits nothing, and those for which the host's rules raise."""
    batch = make_batch([Tree([-1, -1, 0])] * 7, 6, 8)
    target, draft, starts = batch.target_probs, batch.draft_probs, batch.logit_start.clone()
    starts[0] = -1
    target[starts[1], (batch.tokens[1, 1] + 1) % 6] = torch.nan
    target[starts[2]] = 0
    batch.tokens[3, 2] = 6
    batch.tokens[4, 0] = -1
    draft[batch.draft_start[5], batch.tokens[5, 1]] = 0
    batch = replace(batch, logit_start=starts, accept_uniforms=torch.full((7, 3), 1 - 2**-24).double())
    for rule in ("recursive", "traversal"):
        expected = reference(rule, *batch.args())[2]
        assert expected[:6].tolist() == [-1] * 6 and expected[6] >= 0
        assert op.verify(rule, *batch.args(device))[2].tolist() == expected.tolist()


def test_nothing_to_verify(device):
    batch = make_batch([Tree([])], 5, 9)
    empty = Batch(*(None if v is None else v if v.ndim == 2 and v.shape[1] == 5 else v[:0] for v in vars_of(batch)))
    for rule in ("recursive", "one_hot", "traversal"):
        check(rule, batch, device)
        assert [len(out) for out in op.verify(rule, *empty.args(device))] == [0, 0, 0]


def test_rules_say_what_they_need():
    batch = make_batch([Tree([-1])], 5, 9)
    for rule, changed, remedy in (
        ("tokne", batch, "use one of"),
        ("token", batch, "trees"),
        ("traversal", batch.deterministic(), "one_hot"),
        ("recursive", replace(batch, draft_start=None), "both or neither"),
    ):
        for verify in (op.verify, reference):
            with pytest.raises(ValueError, match=remedy):
                verify(rule, *changed.args())


def emitted_law(verify, device, num_rows: int) -> float:
    """Standard deviations by which chi-square of the first two tokens exceeds its mean, for chains of one draft."""
    rng = np.random.default_rng(11)
    target, draft = softmax(rng.standard_normal((5, 4)) * 2.5), softmax(rng.standard_normal(4) * 2.5)
    tokens = rng.choice(4, num_rows, p=draft.astype(np.float64) / draft.sum(dtype=np.float64))
    # The law after the draft depends on it: row 0 is the root's, row x + 1 that after token x.
    laws_of_rows = np.stack([np.broadcast_to(target[0], (num_rows, 4)), target[tokens + 1]], 1).reshape(-1, 4)
    rows = torch.arange(num_rows)
    args = (
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
    accepted, _, next_token = verify("token", *(None if a is None else a.to(device) for a in args))
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


def broken_copy(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of the op with a broken ``module`` of its own."""
    same = '"""'
    parts = {part.__name__: broken(part, same, same) for part in (decide, sample, greedy)}
    changed = broken(module, old, new)
    if module is laws:
        parts[decide.__name__].reject, parts[decide.__name__].entry_of = changed.reject, changed.entry_of
        parts[sample.__name__].law_tile = changed.law_tile
    else:
        parts[module.__name__] = changed
    copy = broken(op, same, same)
    for name, part in parts.items():
        setattr(copy, name.rpartition(".")[2], part)
    copy.CONFIGS = {"default": SMALL}
    return copy


BREAKS = {
    "first child": ("recursive", decide, "entry == above, other, first", "entry == above, above, first"),
    "siblings": ("recursive", decide, "(entry < other), other", "(entry < other), 0"),
    "draft's mass": ("recursive", decide, "draft_sum = rest\n", "draft_sum = one\n"),
    "reset": ("recursive", decide, "            target_sum = one\n            draft_sum = one\n", ""),
    "path": ("recursive", decide, "entry == num_accepted, child - 1", "entry == num_accepted, child"),
    "left over": ("one_hot", decide, "target_sum -= target", "target_sum -= 0.0 * target"),
    "hope": ("traversal", decide, "(child == 0) & (uniform >= ratio)", "(child == 0)"),
    "ratio": ("traversal", decide, "both = mass + 1.0 - ratio", "both = mass + 1.0"),
    "root": ("traversal", decide, "                if node > 0:\n", "                if node >= 0:\n"),
    "scale": ("traversal", laws, "high = scale.to(tl.float32)", "high = 0.0 * scale.to(tl.float32) + 1.0"),
    "rejected": ("recursive", laws, "draft = tl.where(column == token, 0.0, draft)", "draft = draft"),
    "vocabulary": ("one_hot", laws, "weights = tl.where(column == token, 0.0, weights)", "weights = weights"),
    "law's row": ("recursive", sample, "draft_start_ptr + row) + last", "draft_start_ptr + row)"),
    "tile": ("recursive", sample, "goal - below", "goal"),
}


SENSITIVE_SEED = 0


@pytest.fixture(scope="module")
def sensitive() -> dict[str, tuple[Batch, tuple[Tensor, Tensor, Tensor]]]:
    trees = [Tree([-1] * 5)] * 3 + [Tree([-1, 0, 0, -1, 3, 0])] * 3 + [Tree([-1, -1, 1, 1, 2, 2])] * 2
    batch = make_batch(trees, 11, SENSITIVE_SEED, scales=(1.0,))
    return {rule: (batch, reference(rule, *batch.args())) for rule in ("recursive", "one_hot", "traversal")}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_noticed(name, device, sensitive):
    rule, *change = BREAKS[name]
    batch, expected = sensitive[rule]
    assert differing(broken_copy(*change).verify(rule, *batch.args(device)), expected).any()


def test_the_batch_that_notices_is_fine_itself(device, sensitive, small_pieces):
    for rule, (batch, expected) in sensitive.items():
        assert not differing(op.verify(rule, *batch.args(device)), expected).any()
