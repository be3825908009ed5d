"""The ledger: nothing is delivered twice, nothing is lost, and loads add up, whatever the order of events."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_daemon.requests import MAX_DEATHS, Handover, Ledger

INCARNATIONS = st.integers(1, 5)
TOKENS = st.lists(st.integers(0, 9), max_size=3)


@dataclass
class Expected:
    """What the ledger is to say of a request. `attempts`: all ids it ever had in an engine, the current one last."""

    owner: int | None
    attempts: list[str]
    output: list[int] = field(default_factory=list)
    deaths: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Compares the ledger with a plain model."""

    @initialize()
    def start(self) -> None:
        self.ledger: Ledger[str] = Ledger()
        self.model: dict[str, Expected] = {}
        self.created = 0

    def some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(owner=INCARNATIONS)
    def admit(self, owner: int) -> None:
        rid = f"r{self.created:03}"
        self.created += 1
        self.ledger.admit(rid, f"request {rid}", owner)
        self.model[rid] = Expected(owner, [rid])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), sender=INCARNATIONS, tokens=TOKENS, finished=st.booleans())
    def deliver(self, data: st.DataObject, sender: int, tokens: list[int], finished: bool) -> None:
        rid = self.some(data)
        expected = self.model[rid]
        attempt = data.draw(st.sampled_from(expected.attempts))
        accepted = self.ledger.deliver(attempt, sender, tokens, finished)
        current = attempt == expected.attempts[-1] and sender == expected.owner
        assert accepted == (rid if current else None), "exactly what the owner says of its attempt is delivered"
        if current:
            expected.output.extend(tokens)
            expected.deaths = 0 if tokens else expected.deaths
            if finished:
                del self.model[rid]

    @rule(sender=INCARNATIONS, tokens=TOKENS)
    def deliver_unknown(self, sender: int, tokens: list[int]) -> None:
        assert self.ledger.deliver("unknown", sender, tokens, True) is None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        rid = self.some(data)
        assert self.ledger.forget(rid) is not None
        assert self.ledger.forget(rid) is None
        del self.model[rid]

    @rule(gone=st.sets(INCARNATIONS))
    def void(self, gone: set[int]) -> None:
        orphans = {rid: expected for rid, expected in self.model.items() if expected.owner in gone}
        handover = self.ledger.void(gone)
        for expected in orphans.values():
            expected.owner = None
            expected.deaths += 1
        given_up = tuple(rid for rid, expected in orphans.items() if expected.deaths == MAX_DEATHS)
        for rid in given_up:
            del self.model[rid], orphans[rid]
        assert handover.given_up == given_up
        assert handover.replayed == tuple(rid for rid, expected in orphans.items() if expected.output)
        assert handover.restarted == tuple(rid for rid, expected in orphans.items() if not expected.output)
        assert handover.kept == sum(expected.owner is not None for expected in self.model.values())

    @rule(draining=INCARNATIONS)
    def withdraw(self, draining: int) -> None:
        owned = [expected for expected in self.model.values() if expected.owner == draining]
        assert self.ledger.withdraw(draining) == tuple(expected.attempts[-1] for expected in owned)
        for expected in owned:
            expected.owner = None

    @precondition(lambda self: any(expected.owner is None for expected in self.model.values()))
    @rule(owner=INCARNATIONS)
    def adopt_oldest(self, owner: int) -> None:
        rid = self.ledger.orphans()[0]
        entry, expected = self.ledger.adopt(rid, owner), self.model[rid]
        assert (entry.request, entry.output) == (f"request {rid}", expected.output)
        assert entry.attempt_id not in expected.attempts, "an engine may still have the request by that name"
        expected.owner = owner
        expected.attempts.append(entry.attempt_id)

    @invariant()
    def agrees_with_model(self) -> None:
        assert len(self.ledger) == len(self.model)
        for rid, expected in self.model.items():
            entry = self.ledger.get(rid)
            assert entry is not None
            assert (entry.owner, entry.output, entry.deaths) == (expected.owner, expected.output, expected.deaths)
            assert self.ledger.is_under_way(expected.attempts[-1]) == (expected.owner is not None)
            assert not any(map(self.ledger.is_under_way, expected.attempts[:-1]))
        assert self.ledger.orphans() == [rid for rid, expected in self.model.items() if expected.owner is None]

    @invariant()
    def loads_add_up(self) -> None:
        for incarnation in range(7):
            owned = sum(expected.owner == incarnation for expected in self.model.values())
            assert self.ledger.load(incarnation) == owned


TestLedger = LedgerMachine.TestCase


def test_a_zombie_delivers_nothing_after_its_requests_moved_on() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    assert ledger.deliver("r", 1, [7], False) == "r"
    assert ledger.void([1]) == Handover(0, ("r",), ())
    assert ledger.deliver("r", 1, [8], True) is None, "an orphan belongs to nobody"
    entry = ledger.adopt("r", 2)
    assert ledger.deliver("r", 1, [8], True) is None, "the old owner may still send what it had in flight"
    assert ledger.deliver(entry.attempt_id, 2, [9], False) == "r"
    assert (entry.output, entry.attempts) == ([7, 9], 2)


def test_a_request_that_comes_back_is_another_attempt() -> None:
    """Drained from a rank to another and back, it must not get what the rank still computes of the first attempt."""
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    assert ledger.withdraw(1) == ("r",)
    second = ledger.adopt("r", 2).attempt_id
    assert ledger.withdraw(2) == (second,)
    third = ledger.adopt("r", 1).attempt_id
    assert ledger.deliver("r", 1, [7], True) is None
    assert ledger.deliver(second, 1, [7], True) is None
    assert ledger.deliver(third, 1, [8], False) == "r"
    assert (ledger.load(1), ledger.load(2)) == (1, 0)


def die(ledger: Ledger[str], request_id: str, times: int) -> Handover:
    """Its owner dies, and the next one too."""
    for _ in range(times):
        if request_id in ledger.orphans():
            ledger.adopt(request_id, 1)
        handover = ledger.void([1])
    return handover


def test_a_request_that_nobody_survives_is_given_up() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("poison", "request", 1)
    ledger.admit("innocent", "request", 2)
    assert die(ledger, "poison", MAX_DEATHS - 1) == Handover(1, (), ("poison",))
    assert die(ledger, "poison", 1) == Handover(1, (), (), ("poison",))
    assert ("poison" in ledger, "innocent" in ledger, ledger.orphans()) == (False, True, [])


def test_a_token_clears_a_request_of_the_deaths_before_it() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    die(ledger, "r", MAX_DEATHS - 1)
    entry = ledger.adopt("r", 1)
    ledger.deliver(entry.attempt_id, 1, [], False)
    assert entry.deaths == MAX_DEATHS - 1, "a message without a token proves nothing"
    ledger.deliver(entry.attempt_id, 1, [7], False)
    assert die(ledger, "r", MAX_DEATHS - 1).given_up == ()
    assert die(ledger, "r", 1).given_up == ("r",)


def test_neither_waiting_nor_draining_counts_as_a_death() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    for _ in range(MAX_DEATHS):
        ledger.withdraw(1)
        ledger.void([1, 2])
        ledger.adopt("r", 1)
    entry = ledger.get("r")
    assert entry is not None
    assert entry.deaths == 0


def test_only_an_orphan_can_be_adopted() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    with pytest.raises(AssertionError):
        ledger.adopt("r", 2)
    with pytest.raises(KeyError):
        ledger.adopt("unknown", 2)
    assert (ledger.load(1), ledger.load(2)) == (1, 0)


def test_an_id_in_flight_is_not_admitted_again() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    with pytest.raises(ValueError, match="request r "):
        ledger.admit("r", "another", 2)
    ledger.withdraw(1)
    attempt = ledger.adopt("r", 1).attempt_id
    with pytest.raises(ValueError, match=f"request {attempt} "):
        ledger.admit(attempt, "another", 2)
    entry = ledger.get("r")
    assert entry is not None
    assert (entry.request, entry.owner, ledger.load(1), ledger.load(2)) == ("request", 1, 1, 0)
    ledger.forget("r")
    ledger.admit("r", "another", 2)
    assert (ledger.load(1), ledger.load(2)) == (0, 1)


def test_finished_requests_leave_and_free_their_rank() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("a", "request", 1)
    assert ledger.deliver("a", 1, [], True) == "a"
    assert "a" not in ledger
    assert ledger.load(1) == 0
    assert ledger.deliver("a", 1, [1], False) is None


def test_least_loaded_prefers_the_first_listed() -> None:
    ledger: Ledger[str] = Ledger()
    assert ledger.least_loaded((4, 2, 3)) == 4
    ledger.admit("a", "request", 4)
    assert ledger.least_loaded((4, 2, 3)) == 2
    ledger.admit("b", "request", 2)
    assert ledger.least_loaded((4, 2, 3)) == 3
    ledger.admit("c", "request", 3)
    assert ledger.least_loaded((4, 2, 3)) == 4


def test_a_voided_rank_starts_from_zero() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("a", "request", 1)
    ledger.void([1])
    assert ledger.load(1) == 0
    ledger.forget("a")
    assert ledger.load(1) == 0, "an orphan that ends counts for nobody"
