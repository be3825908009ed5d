"""Which groups and numbers of tokens a rank rehearses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.engine.rehearsal import ALIGNED, LOSSES, TOKENS, group_sizes, step_tokens


@given(members=st.integers(1, 72), fewest=st.integers(1, 72))
def test_the_group_and_those_after_a_loss_or_two_are_rehearsed_as_far_as_experts_fit(members: int, fewest: int) -> None:
    sizes = group_sizes(members, min(fewest, members))
    assert sizes[0] == members
    assert list(sizes) == sorted(sizes, reverse=True)
    assert min(sizes) == max(members - LOSSES, min(fewest, members), 1)


GROUPS = {"members": st.integers(1, 72), "slots": st.integers(1, 40), "chosen": st.integers(1, 8)}


@given(most=st.integers(1, 8192), **GROUPS)
def test_steps_are_on_both_sides_of_each_choice_of_a_kernel(members: int, slots: int, chosen: int, most: int) -> None:
    steps = step_tokens(members, most, members * slots, chosen)
    assert steps == tuple(sorted(set(steps)))
    possible = range(members, members * most + 1)
    assert set(steps) <= set(possible)
    assert {each for total in TOKENS for each in (total, total + 1) if each in possible} <= set(steps)


@given(**GROUPS)
def test_between_two_choices_there_is_each_alignment_that_any_step_has(members: int, slots: int, chosen: int) -> None:
    experts = members * slots
    steps = step_tokens(members, TOKENS[-1], experts, chosen)

    def alignments(steps: Iterable[int]) -> set[tuple[bool, ...]]:
        rows = [one * chosen for one in steps]
        return {(one % ALIGNED == 0, one < experts or (one - experts) % ALIGNED == 0) for one in rows}

    for last, total in itertools.pairwise((members - 1, *(total for total in TOKENS if total >= members))):
        assert alignments(one for one in steps if last < one <= total) == alignments(range(last + 1, total + 1))


@given(**GROUPS)
def test_so_there_is_of_the_steps_that_are_graphs(members: int, slots: int, chosen: int) -> None:
    """Padded, so that all ranks have as many tokens: a rehearsal of another number would not be that step."""
    steps = step_tokens(members, TOKENS[-1], members * slots, chosen)
    graphs = [members * each for each in (1, 2, 4, *range(8, TOKENS[-1] // members + 1, 8))]
    for last, total in itertools.pairwise((0, *TOKENS)):
        between = {one * chosen % ALIGNED == 0 for one in graphs if last < one <= total}
        assert {one * chosen % ALIGNED == 0 for one in graphs if last < one <= total and one in steps} == between


def test_three_ranks_of_four_have_steps_that_four_do_not_have() -> None:
    """With 24 slots, 44 tokens make 88 rows, and 88 + 24 * 31 is a multiple of 16. With 32 slots none are without
    the rows being one."""
    three, four = (set(step_tokens(members, 64, members * 8, chosen=2)) for members in (3, 4))
    assert {12, 20, 28, 44, 60} <= three - four
