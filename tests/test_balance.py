"""Work over ranks: every item once, near the best there is, the same wherever it is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genevolve_fast.batch.balance import assign
from genevolve_fast.profile.flops import GroupLengths, Passes, group_cost, sequence_cost
from genevolve_fast.profile.shapes import BUILT_IN

costs = st.lists(st.floats(0, 1e15), max_size=40)


@given(costs, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_item_goes_to_one_rank_in_order(costs, ranks):
    shares = assign(costs, ranks)
    assert len(shares) == ranks and all(share == sorted(share) for share in shares)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))


def largest_load(costs, shares):
    return max(sum(costs[i] for i in share) for share in shares)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_largest_load_is_within_four_thirds_of_the_best(costs, ranks):
    ways = product(range(ranks), repeat=len(costs))
    best = min(max(sum(c for c, r in zip(costs, way, strict=True) if r == k) for k in range(ranks)) for way in ways)
    assert 3 * ranks * largest_load(costs, assign(costs, ranks)) <= (4 * ranks - 1) * best


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_many_small_items_come_out_even(costs, ranks):
    mean = sum(costs) / ranks
    load = largest_load(costs, assign(costs, ranks))
    assert load <= mean + max(costs) * (1 - 1 / ranks) + 1e-6
    if max(costs) <= mean / 3:
        assert load <= mean * 4 / 3


def test_ties_go_by_index_and_a_rank_may_get_nothing():
    assert assign([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert assign([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert assign([7], 3) == [[0], [], []] and assign([], 2) == [[], []]
    assert assign([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]
    assert assign([3, 1, 2], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_what_is_no_cost_is_refused(wrong):
    with pytest.raises(ValueError, match="a cost must be"):
        assign([1.0, wrong], 2)
    with pytest.raises(ValueError, match="ranks must be"):
        assign([1.0], 0)


def test_every_process_finds_the_same():
    code = "from genevolve_fast.batch.balance import assign; print(assign([3.5, 2, 2, 1e9] * 9, 4))"
    found = {
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    }
    assert found == {f"{assign([3.5, 2, 2, 1e9] * 9, 4)}\n"}


def test_costs_grow_with_length_and_faster_where_attention_does():
    shape = BUILT_IN["qwen3-vl-8b"]
    one, two, far = (sequence_cost(shape, n, 100) for n in (1000, 2000, 64_000))
    assert two > 2 * one * 0.98 and far > 64 * one * 1.2
    head = 2 * shape.vocabulary * shape.hidden * Passes().head
    assert sequence_cost(shape, 1000, 101) - one == pytest.approx(head)
    alone = GroupLengths(prefix=400, replies=(600,), loss_tokens=(100,))
    assert group_cost(shape, alone) == pytest.approx(one)
    shared = GroupLengths(prefix=6000, replies=(600,) * 6)
    assert group_cost(shape, shared) < 6 * sequence_cost(shape, 6600, 600)
