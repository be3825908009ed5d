"""The ledger: nothing is delivered twice, nothing is lost, and loads add up, whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_daemon.requests import Handover, Ledger

INCARNATIONS = st.integers(1, 5)
TOKENS = st.lists(st.integers(0, 9), max_size=3)


class LedgerMachine(RuleBasedStateMachine):
    """Compares the ledger with a plain model: request id -> [owner, tokens]."""

    @initialize()
    def start(self) -> None:
        self.ledger: Ledger[str] = Ledger()
        self.model: dict[str, tuple[int | None, list[int]]] = {}
        self.created = 0

    def some(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(owner=INCARNATIONS)
    def admit(self, owner: int) -> None:
        rid = f"r{self.created:03}"
        self.created += 1
        self.ledger.admit(rid, f"request {rid}", owner)
        self.model[rid] = (owner, [])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), sender=INCARNATIONS, tokens=TOKENS, finished=st.booleans())
    def deliver(self, data: st.DataObject, sender: int, tokens: list[int], finished: bool) -> None:
        rid = self.some(data)
        owner, output = self.model[rid]
        accepted = self.ledger.deliver(rid, sender, tokens, finished)
        assert accepted == (owner == sender), "exactly what comes from the owner is delivered"
        if accepted:
            output.extend(tokens)
            if finished:
                del self.model[rid]

    @rule(sender=INCARNATIONS, tokens=TOKENS)
    def deliver_unknown(self, sender: int, tokens: list[int]) -> None:
        assert not self.ledger.deliver("unknown", sender, tokens, True)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        rid = self.some(data)
        self.ledger.forget(rid)
        self.ledger.forget(rid)
        del self.model[rid]

    @rule(gone=st.sets(INCARNATIONS))
    def void(self, gone: set[int]) -> None:
        moved = [rid for rid, (owner, _) in self.model.items() if owner in gone]
        handover = self.ledger.void(gone)
        assert handover.replayed == tuple(rid for rid in moved if self.model[rid][1])
        assert handover.restarted == tuple(rid for rid in moved if not self.model[rid][1])
        for rid in moved:
            self.model[rid] = (None, self.model[rid][1])
        assert handover.kept == sum(owner is not None for owner, _ in self.model.values())

    @precondition(lambda self: any(owner is None for owner, _ in self.model.values()))
    @rule(owner=INCARNATIONS)
    def adopt_oldest(self, owner: int) -> None:
        rid = self.ledger.orphans()[0]
        entry = self.ledger.adopt(rid, owner)
        assert (entry.request, entry.output) == (f"request {rid}", self.model[rid][1])
        self.model[rid] = (owner, self.model[rid][1])

    @invariant()
    def agrees_with_model(self) -> None:
        assert len(self.ledger) == len(self.model)
        for rid, (owner, output) in self.model.items():
            entry = self.ledger.get(rid)
            assert entry is not None
            assert (entry.owner, entry.output) == (owner, output)
            assert self.ledger.owner(rid) == owner
        assert self.ledger.orphans() == [rid for rid, (owner, _) in self.model.items() if owner is None]

    @invariant()
    def loads_add_up(self) -> None:
        for incarnation in range(7):
            owned = sum(owner == incarnation for owner, _ in self.model.values())
            assert self.ledger.load(incarnation) == owned


TestLedger = LedgerMachine.TestCase


def test_a_zombie_delivers_nothing_after_its_requests_moved_on() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    assert ledger.deliver("r", 1, [7], False)
    assert ledger.void([1]) == Handover(0, ("r",), ())
    assert not ledger.deliver("r", 1, [8], True), "an orphan belongs to nobody"
    entry = ledger.adopt("r", 2)
    assert not ledger.deliver("r", 1, [8], True), "the old owner may still send what it had in flight"
    assert ledger.deliver("r", 2, [9], False)
    assert (entry.output, entry.attempts) == ([7, 9], 2)


def test_only_an_orphan_can_be_adopted() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    with pytest.raises(AssertionError):
        ledger.adopt("r", 2)
    with pytest.raises(KeyError):
        ledger.adopt("unknown", 2)
    assert (ledger.owner("r"), ledger.load(1), ledger.load(2)) == (1, 1, 0)


def test_an_id_in_flight_is_not_admitted_again() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("r", "request", 1)
    with pytest.raises(ValueError, match="request r "):
        ledger.admit("r", "another", 2)
    entry = ledger.get("r")
    assert entry is not None
    assert (entry.request, entry.owner, ledger.load(1), ledger.load(2)) == ("request", 1, 1, 0)
    ledger.forget("r")
    ledger.admit("r", "another", 2)
    assert (ledger.load(1), ledger.load(2)) == (0, 1)


def test_finished_requests_leave_and_free_their_rank() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit("a", "request", 1)
    assert ledger.deliver("a", 1, [], True)
    assert "a" not in ledger
    assert ledger.load(1) == 0
    assert not ledger.deliver("a", 1, [1], False)


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
