"""Routers by themselves, on replicas that are only numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from sim.replica import SimRequest
from sim.router import ROUTERS, ModelRouter, make_router


@dataclass
class View:
    outstanding_tokens: int = 0
    num_outstanding: int = 0
    cached: set[int] = field(default_factory=set)

    def num_cached_blocks(self, request: SimRequest) -> int:
        return next(
            (i for i, h in enumerate(request.block_hashes) if h not in self.cached), len(request.block_hashes)
        )


def request(number: int = 0, task: str = "", hashes: list[int] | None = None) -> SimRequest:
    return SimRequest(
        request_id=number, prompt_len=100, max_tokens=20, output_len=5, task=task, block_hashes=hashes or []
    )


def routed(name: str, views: list[View], num: int, **options: object) -> list[int | None]:
    router = make_router(name, **options)
    return [router.route(request(i), views, 0.0) for i in range(num)]


def test_round_robin_takes_turns_and_survives_fewer_replicas():
    views = [View() for _ in range(3)]
    router = make_router("round_robin")
    assert [router.route(request(), views, 0.0) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert router.route(request(), views[:2], 0.0) == 0


def test_random_is_uniform_and_repeats_with_its_seed():
    views = [View() for _ in range(4)]
    chosen = routed("random", views, 8000, seed=1)
    assert all(abs(count - 2000) < 5 * 39 for count in Counter(chosen).values())  # sd √(8000 · 3/16) = 38.7
    assert chosen == routed("random", views, 8000, seed=1) != routed("random", views, 8000, seed=2)


def test_power_of_two_takes_the_lighter_of_two_different_ones():
    views = [View(outstanding_tokens=load) for load in (30, 10, 20)]
    chosen = Counter(routed("power_of_two", views, 6000))
    assert chosen[0] == 0, "the heaviest is never the lighter of two"
    assert abs(chosen[1] - 4000) < 5 * 37, "the lightest is in two of three pairs"
    assert routed("power_of_two", views[:1], 3) == [0, 0, 0]


def test_power_of_two_balances_better_than_random():
    def most_loaded(name: str) -> int:
        views = [View() for _ in range(50)]
        router = make_router(name, seed=3)
        for number in range(1000):
            index = router.route(request(number), views, 0.0)
            assert index is not None
            views[index].outstanding_tokens += 1
        return max(view.outstanding_tokens for view in views)

    assert most_loaded("power_of_two") <= 24 < 28 <= most_loaded("random")


def test_least_outstanding_counts_tokens_not_requests():
    views = [View(outstanding_tokens=50, num_outstanding=1), View(outstanding_tokens=40, num_outstanding=9)]
    assert routed("least_outstanding", views, 1) == [1]


def test_prefix_affinity_follows_the_longest_prefix_until_the_load_is_uneven():
    views = [View(), View(cached={1, 2, 3}), View(cached={1})]
    router = make_router("prefix_affinity", max_imbalance=2.0)
    with_prefix = request(hashes=[1, 2, 3, 4])
    assert router.route(with_prefix, views, 0.0) == 1
    views[1].outstanding_tokens = 120  # 120 + 120 of its own is just twice 0 + 120
    assert router.route(with_prefix, views, 0.0) == 1
    views[1].outstanding_tokens = 121
    assert router.route(with_prefix, views, 0.0) == 0
    assert router.route(request(hashes=[9]), views, 0.0) == 0, "nobody knows it: the least loaded"


def test_central_queue_holds_until_a_slot_is_free():
    views = [View(num_outstanding=2), View(num_outstanding=1)]
    assert routed("central_queue", views, 1, slots=2) == [1]
    assert routed("central_queue", views, 1, slots=1) == [None]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("round_robbin", {}, "did you mean round_robin"),
        ("random", {"slots": 2}, "'random' does not take these options"),
        ("central_queue", {"slots": 0}, "slots=0 must be >= 1"),
        ("prefix_affinity", {"max_imbalance": 0.5}, "max_imbalance=0.5"),
    ],
)
def test_wrong_routers_are_refused(name: str, options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        make_router(name, **options)


def test_routers_that_ignore_state_say_so():
    blind = {name for name in ROUTERS if not make_router(name).looks_at_state}
    assert blind == {"round_robin", "random"}


def test_model_router_sends_classes_to_pools_and_escalates_by_chance():
    router = ModelRouter({"hard": "large"}, "small", escalation={"easy": 0.25}, escalate_to="large", seed=5)
    assert [router.pool_of(task) for task in ("easy", "hard", "new")] == ["small", "large", "small"]
    assert router.pool_names == ["large", "small"]
    escalated = [router.escalates(request(number, "easy")) for number in range(4000)]
    assert abs(sum(escalated) - 1000) < 5 * 27.4  # √(4000 · 3/16)
    assert escalated[::-1] == [router.escalates(request(n, "easy")) for n in range(3999, -1, -1)]
    assert not any(router.escalates(request(number, "new")) for number in range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"escalation": {"easy": 1.5}, "escalate_to": "large"}, "give a probability"),
        ({"escalation": {"easy": 0.5}}, "name another pool"),
        ({"escalation": {"hard": 0.5}, "escalate_to": "large"}, "name another pool"),
        ({"escalate_to": "large"}, "no task has an escalation"),
    ],
)
def test_wrong_model_routing_is_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ModelRouter({"hard": "large"}, "small", **options)  # pyright: ignore[reportArgumentType]
