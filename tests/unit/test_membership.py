"""Rank states and their transitions, incarnations, epochs."""

from __future__ import annotations

import itertools

import pytest

from elastic_daemon.membership import ALIVE, IN_GROUP, MEMBERS, TRANSITIONS, IllegalTransition, Membership, RankState

ROUTES: dict[RankState, tuple[RankState, ...]] = {
    RankState.STARTING: (),
    RankState.STANDBY: (RankState.STANDBY,),
    RankState.JOINING: (RankState.STANDBY, RankState.JOINING),
    RankState.ACTIVE: (RankState.STANDBY, RankState.JOINING, RankState.ACTIVE),
    RankState.SUSPECT: (RankState.STANDBY, RankState.JOINING, RankState.ACTIVE, RankState.SUSPECT),
    RankState.DRAINING: (RankState.STANDBY, RankState.JOINING, RankState.ACTIVE, RankState.DRAINING),
    RankState.EXCLUDED: (RankState.EXCLUDED,),
    RankState.RETIRED: (RankState.RETIRED,),
}


def in_state(state: RankState) -> Membership:
    """A table whose rank 0 went to `state` step by step."""
    ranks = Membership()
    ranks.start(0, now=0.0)
    for step in ROUTES[state]:
        ranks.move(0, step, now=1.0)
    return ranks


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RankState, RankState)))
def test_exactly_the_transitions_of_the_table_are_possible(old: RankState, new: RankState) -> None:
    ranks = in_state(old)
    if new is RankState.STARTING or new not in TRANSITIONS[old]:
        with pytest.raises(IllegalTransition, match=f"rank 0: {old} -> {new}"):
            ranks.move(0, new, now=2.0)
        assert ranks[0].state is old
    else:
        row = ranks.move(0, new, now=2.0, reason="because")
        assert (row.state, row.since, row.reason) == (new, 2.0, "because")


@pytest.mark.parametrize("state", list(RankState))
def test_a_rank_starts_again_only_when_it_is_gone(state: RankState) -> None:
    ranks = in_state(state)
    if state in (RankState.EXCLUDED, RankState.RETIRED):
        row = ranks.start(0, now=2.0)
        assert (row.state, row.incarnation, row.starts, row.reason) == (RankState.STARTING, 2, 2, None)
    else:
        with pytest.raises(IllegalTransition):
            ranks.start(0, now=2.0)


def test_every_state_is_left_and_reached() -> None:
    assert set(TRANSITIONS) == set(RankState)
    assert set().union(*TRANSITIONS.values()) == set(RankState)
    assert all(TRANSITIONS[state] for state in RankState)
    assert IN_GROUP < MEMBERS < ALIVE < set(RankState)


def test_incarnations_rise_over_all_ranks_and_are_never_reused() -> None:
    ranks = Membership()
    seen = [ranks.start(rank, 0.0).incarnation for rank in (0, 1, 2)]
    for rank in (1, 0, 1):
        ranks.move(rank, RankState.EXCLUDED, 1.0)
        seen.append(ranks.start(rank, 2.0).incarnation)
    assert seen == sorted(set(seen))


def test_only_a_living_incarnation_is_current() -> None:
    ranks = Membership()
    old = ranks.start(0, 0.0)
    assert ranks.current(*old.identity) == old
    assert ranks.current(0, old.incarnation + 1) is None
    assert ranks.current(7, old.incarnation) is None
    ranks.move(0, RankState.EXCLUDED, 1.0, "gone")
    assert ranks.current(*old.identity) is None
    new = ranks.start(0, 2.0)
    assert ranks.current(*old.identity) is None
    assert ranks.current(*new.identity) == new


def test_rows_come_ascending_and_by_state() -> None:
    ranks = Membership()
    for rank in (2, 0, 1):
        ranks.start(rank, 0.0)
    ranks.move(1, RankState.STANDBY, 1.0)
    ranks.move(0, RankState.STANDBY, 1.0)
    ranks.move(0, RankState.JOINING, 1.0)
    assert [row.rank for row in ranks] == [0, 1, 2]
    assert [row.rank for row in ranks.where(RankState.STANDBY, RankState.STARTING)] == [1, 2]
    assert [row.rank for row in ranks.members] == [0]


def test_epochs_rise() -> None:
    ranks = Membership()
    assert [ranks.epoch, ranks.next_epoch(), ranks.next_epoch(), ranks.epoch] == [0, 1, 2, 2]
