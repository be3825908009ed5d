"""Which groups and numbers of tokens a rank rehearses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.engine.rehearsal import LOSSES, TOKENS, group_sizes, tokens_per_rank


@given(members=st.integers(1, 72), fewest=st.integers(1, 72))
def test_the_group_and_those_after_a_loss_or_two_are_rehearsed_as_far_as_experts_fit(members: int, fewest: int) -> None:
    sizes = group_sizes(members, min(fewest, members))
    assert sizes[0] == members
    assert list(sizes) == sorted(sizes, reverse=True)
    assert min(sizes) == max(members - LOSSES, min(fewest, members), 1)


@given(members=st.integers(1, 72), most=st.integers(1, 8192))
def test_the_sums_are_on_both_sides_of_each_choice_of_a_kernel(members: int, most: int) -> None:
    counts = tokens_per_rank(members, most)
    assert counts == tuple(sorted(set(counts)))
    assert all(1 <= count <= most for count in counts)
    sums = [count * members for count in counts]
    for total in TOKENS:
        if members <= total <= (most - 1) * members:
            assert any(total - members < each <= total for each in sums), total
            assert any(total < each <= total + members for each in sums), total


def test_the_counts_of_four_ranks() -> None:
    assert tokens_per_rank(4, 64) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 64)
