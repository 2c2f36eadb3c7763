"""Token trees in the C++ decoder: a node's logits are, to the bit, those of its path decoded plainly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from specdec_kernels.cpu_decoder import is_available
from specdec_kernels.tolerances import LOGITS, scaled_error
from torch import Tensor

from tests.kernels.native import FLAVOURS, Model, Session, random_tokens
from tests.kernels.trees import Tree, chain, random_tree, rooted_trees

AVAILABLE, REASON = is_available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"native decoder: {REASON}")


def path_logits(model: Model, contexts: Sequence[list[int]], trees: Sequence[Tree]) -> list[Tensor]:
    """Logits [tokens, V] of each tree's nodes, one path of every tree at a time behind its context."""
    longest = max(map(len, contexts)) + max(map(len, trees))
    session = Session(model.decoder, len(trees), longest)
    prompts = {row: context for row, context in enumerate(contexts) if context}
    if prompts:
        session.step(prompts)
    results = [torch.full((len(tree), model.spec.vocab_size), torch.nan) for tree in trees]
    for turn in range(max(len(tree.leaves) for tree in trees)):
        paths, tokens = {}, {}
        for row, tree in enumerate(trees):
            if turn < len(tree.leaves):
                paths[row], drafts = tree.path(tree.leaves[turn]), node_tokens(model, tree, row)
                tokens[row] = [drafts[node] for node in paths[row]]
        for (row, path), logits in zip(paths.items(), session.step(tokens), strict=True):
            results[row][path] = logits
            session.lengths[row] = len(contexts[row])
    return results


def node_tokens(model: Model, tree: Tree, index: int, seed: int = 0) -> list[int]:
    return random_tokens(model.spec, len(tree), 1000 * seed + index + 500)


def check_trees(model: Model, lengths: Sequence[int], trees: Sequence[Tree], block_size: int = 16) -> None:
    """All trees in one step, each behind a context of its own, in a cache of NaN."""
    contexts = [random_tokens(model.spec, length, row) for row, length in enumerate(lengths)]
    longest = max(length + len(tree) for length, tree in zip(lengths, trees, strict=True))
    session = Session(model.decoder, len(trees), longest, block_size)
    session.poison()
    if any(contexts):
        session.step({row: context for row, context in enumerate(contexts) if context})
    actual = session.step(
        {row: node_tokens(model, tree, row) for row, tree in enumerate(trees)}, dict(enumerate(trees))
    )
    for logits, expected in zip(actual, path_logits(model, contexts, trees), strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_shape_of_up_to_six_nodes(flavour: str) -> None:
    trees = [tree for size in range(1, 8) for tree in rooted_trees(size)]
    assert len(trees) == 1 + 1 + 2 + 4 + 9 + 20 + 48
    check_trees(Model("llama", flavour), [row % 19 for row in range(len(trees))], trees)


@pytest.mark.parametrize("seed", range(2))
def test_random_trees(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.permutation([0, 1, 15, 16, 17, 31, 32, 33, 71, 100])[:6].tolist()
    trees = [random_tree(rng, size) for size in (2, 5, 9, 17, 32, 65)]
    check_trees(model, lengths, trees, block_size=int(rng.choice([16, 32, 48])))


def test_the_largest_trees(model: Model) -> None:
    """127 nodes; in a single chain the last rows of a window see no context at all."""
    trees = [random_tree(np.random.default_rng(5), 128), chain(128)]
    check_trees(model, [50, 31], trees)


def test_trees_beside_other_rows(model: Model) -> None:
    """A prefill chunk, a plain decode, two trees, and a chain with masks instead of causal order."""
    rng = np.random.default_rng(3)
    trees = {1: random_tree(rng, 9), 3: random_tree(rng, 30), 4: chain(7)}
    contexts = [random_tokens(model.spec, length, row) for row, length in enumerate((40, 21, 33, 47, 18))]
    session = Session(model.decoder, 5, 160, block_size=32, seed=4)
    session.step(dict(enumerate(contexts)))
    tokens = {row: node_tokens(model, tree, row) for row, tree in trees.items()}
    chunk, decoded = random_tokens(model.spec, 70), [5]
    new = {3: tokens[3], 2: decoded, 0: chunk, 4: tokens[4], 1: tokens[1]}
    actual = dict(zip(new, session.step(new, trees), strict=True))
    assert torch.equal(actual[0], model.alone([*contexts[0], *chunk])[40:])
    assert torch.equal(actual[2], model.alone([*contexts[2], *decoded])[33:])
    assert torch.equal(actual[4], model.alone([*contexts[4], *tokens[4]])[18:])
    for row in (1, 3):
        padded = [Tree([-1])] * row + [trees[row]]
        expected = path_logits(model, contexts[: row + 1], padded)[row]
        assert torch.equal(actual[row], expected)


def test_causal_tokens_within_a_tree(model: Model) -> None:
    """Zero masks at the front of a tree's row are a chain that it grows from."""
    tree = Tree([*range(-1, 4), 4, 4, 5, 2])
    context, tokens = random_tokens(model.spec, 30), node_tokens(model, tree, 0)
    mask = tree.mask()
    mask[:5] = 0
    session = Session(model.decoder)
    session.step({0: context})
    actual = session.step({0: tokens}, {0: tree}, tree_mask=mask)[0]
    assert torch.equal(actual, path_logits(model, [context], [tree])[0])


@pytest.mark.parametrize("seed", range(3))
def test_decoding_goes_on_from_an_accepted_path(model: Model, seed: int) -> None:
    """Twice a tree, of which a path is kept, then plain tokens; beside a row that keeps its root alone."""
    rng = np.random.default_rng(seed)
    known = [random_tokens(model.spec, int(rng.integers(1, 60)), row) for row in range(2)]
    session = Session(model.decoder, 2, 200, seed=seed)
    session.poison()
    session.step(dict(enumerate(known)))
    for round_ in range(2):
        trees = {row: random_tree(rng, int(rng.integers(2, 40))) for row in range(2)}
        tokens = {row: node_tokens(model, tree, row, round_) for row, tree in trees.items()}
        session.step(tokens, trees)
        for row, path in enumerate((trees[0].path(int(rng.choice(trees[0].leaves))), [0])):
            session.accept(row, path)
            known[row] += [tokens[row][node] for node in path]
    more = random_tokens(model.spec, 5, seed=9)
    decoded = [torch.cat(session.step({0: [token], 1: [token]})) for token in more]
    for row in range(2):
        expected = model.alone([*known[row], *more])[-5:]
        assert torch.equal(torch.stack(decoded)[:, row], expected)


def test_the_number_of_threads_changes_no_bit(model: Model) -> None:
    tree = random_tree(np.random.default_rng(1), 40)
    outputs = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            session = Session(model.decoder)
            session.step({0: random_tokens(model.spec, 37)})
            outputs[threads] = session.step({0: node_tokens(model, tree, 0)}, {0: tree})[0]
        finally:
            torch.set_num_threads(1)
    assert torch.equal(outputs[1], outputs[2])


FORK = Tree([-1, 0, 1, 1])


def masked_step(
    model: Model, mask: NDArray[np.int64], tree: Tree = FORK, order: Sequence[int] = (0, 1, 2, 3)
) -> Tensor:
    """Logits of a tree's tokens, stored in this order behind 20 others, with whatever mask."""
    session, count = Session(model.decoder), len(order)
    session.step({0: random_tokens(model.spec, 20)})
    return session.decoder.forward(
        token_ids=np.array(node_tokens(model, tree, 0))[list(order)],
        positions=20 + np.array(tree.depths)[list(order)],
        query_start=np.array([0, count], np.int32),
        context_lens=np.array([20], np.int32),
        block_tables=session.block_tables,
        slot_mapping=session.slots(0, 20 + np.arange(count)),
        logit_rows=np.arange(count),
        kv_cache=session.cache,
        tree_mask=mask,
    )


def test_every_ancestor_and_every_position_counts(llama: Model) -> None:
    expected = masked_step(llama, FORK.mask())
    wrong = FORK.mask()
    wrong[3, 0] &= ~0b10  # without its parent
    moved = Tree([-1, 0, 1, 2])  # a deeper last token, with the mask of the fork
    for actual in (masked_step(llama, wrong), masked_step(llama, FORK.mask(), moved)):
        assert torch.equal(actual[:3], expected[:3])
        assert scaled_error(actual[3], expected[3]) > 2 * max(LOGITS.values())


def test_children_may_come_before_their_parents(model: Model) -> None:
    """Sums then have another order, and the logits are those of the path but for rounding."""
    tree = random_tree(np.random.default_rng(0), 20)
    order = [0, *range(19, 0, -1)]
    bits = [sum(1 << order.index(token) for token in tree.path(node)) for node in order]
    expected = path_logits(model, [random_tokens(model.spec, 20)], [tree])[0]
    actual = masked_step(model, np.array([[word, 0] for word in bits]), tree, order)
    assert scaled_error(actual, expected[order]) <= LOGITS[model.dtype]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask: mask[:3], r"int64 \[4, 2\]"),
        (lambda mask: mask[:, :1], r"int64 \[4, 2\]"),
        (lambda mask: mask.astype(np.int32), r"int64 \[4, 2\]"),
        (lambda mask: mask & ~np.array([[0, 0], [0, 0], [4, 0], [0, 0]]), "itself"),
        (lambda mask: mask | np.array([[0, 0], [16, 0], [0, 0], [0, 0]]), "beyond its row"),
        (lambda mask: mask | np.array([[0, 0], [0, 0], [0, 0], [0, -(1 << 63)]]), "beyond its row"),
    ],
)
def test_bad_masks_are_refused(llama: Model, change, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        masked_step(llama, change(FORK.mask()))


def test_a_tree_of_129_tokens_is_refused(llama: Model) -> None:
    mask = np.zeros((129, 2), np.int64)
    mask[5, 0] = 1 << 5
    with pytest.raises(AssertionError, match="more than 128"):
        Session(llama.decoder).step({0: random_tokens(llama.spec, 129)}, tree_mask=mask)


def test_moved_slots_change_places(model: Model) -> None:
    """A rotation of three slots in one call, three times over, is no change; twice is one."""
    session = Session(model.decoder, 1, 48, block_size=48)
    session.step({0: random_tokens(model.spec, 40)})
    before = [cache.clone() for cache in (*session.cache.k, *session.cache.v)]
    slots = session.slots(0, np.array([3, 36, 16]))
    for turn in range(1, 4):
        session.cache.move_slots(slots, np.roll(slots, 1))
        after = (*session.cache.k, *session.cache.v)
        assert all(torch.equal(*pair) == (turn == 3) for pair in zip(before, after, strict=True))
    session.cache.move_slots(slots[:0], slots[:0])
    with pytest.raises(AssertionError, match="slot outside the cache"):
        session.cache.move_slots(slots, slots + session.cache.num_blocks * 48)
