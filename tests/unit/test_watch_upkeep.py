"""When the watchdog is started, killed and given up, and what is said meanwhile."""

from __future__ import annotations

from elastic_daemon.watch.upkeep import (
    MAX_ENDS,
    MAX_GAP_S,
    STALE_S,
    START_S,
    WINDOW_S,
    Deed,
    Upkeep,
    WatchMode,
    WatchState,
)

LOOK_S = 0.25


class World:
    """Looks every quarter of a second."""

    def __init__(self, mode: WatchMode = WatchMode.SPAWN) -> None:
        self.now = 100.0
        self.sign: int | None = None
        self.upkeep = Upkeep(mode, self.now)

    def look(self, seconds: float, moving: bool = False) -> list[Deed]:
        deeds = []
        for _ in range(round(seconds / LOOK_S)):
            self.now += LOOK_S
            if moving:
                self.sign = (self.sign or 0) + 1
            if (deed := self.upkeep.look(self.now, self.sign)) is not None:
                deeds.append(deed)
        return deeds

    def alive(self) -> World:
        assert self.look(1) == [Deed.START]
        assert self.look(1, moving=True) == []
        assert (self.upkeep.state, self.upkeep.trouble) == (WatchState.ALIVE, None)
        return self


def test_one_that_dies_is_started_again_and_said_to_be_gone_until_it_lives() -> None:
    world = World().alive()
    world.upkeep.ended(world.now, "was killed by SIGKILL")
    assert world.upkeep.state is WatchState.DOWN
    assert "was killed by SIGKILL" in (world.upkeep.trouble or "")
    assert world.look(1) == [Deed.START]
    assert world.upkeep.trouble is not None, "what the dead one has left is no sign of life"
    assert world.look(1, moving=True) == []
    assert (world.upkeep.state, world.upkeep.trouble) == (WatchState.ALIVE, None)


def test_one_that_hangs_is_killed_once_and_then_started_again() -> None:
    world = World().alive()
    assert world.look(STALE_S - LOOK_S) == []
    assert world.upkeep.trouble is None
    assert world.look(5) == [Deed.KILL]
    assert "has not moved for 3 s" in (world.upkeep.trouble or "")
    world.upkeep.ended(world.now, "was killed by SIGKILL")
    assert "has not moved for 3 s" in (world.upkeep.trouble or "")
    assert world.look(1) == [Deed.START]
    world.look(1, moving=True)
    assert world.upkeep.trouble is None


def test_a_last_sign_of_one_that_was_killed_does_not_count() -> None:
    world = World().alive()
    assert world.look(STALE_S + 1) == [Deed.KILL]
    world.look(0.5, moving=True)
    assert world.upkeep.state is WatchState.DOWN


def test_a_start_may_take_longer() -> None:
    world = World()
    assert world.look(START_S) == [Deed.START]
    assert world.upkeep.state is WatchState.STARTING
    assert world.look(5) == [Deed.KILL]


def test_a_supervisor_that_stood_still_accuses_nobody() -> None:
    world = World().alive()
    world.now += 60
    assert world.upkeep.look(world.now, world.sign) is None
    assert world.look(STALE_S - MAX_GAP_S - 2 * LOOK_S) == []


def test_pauses_grow_and_it_is_given_up_at_last() -> None:
    world = World()
    assert world.look(LOOK_S) == [Deed.START]
    pauses = []
    for _ in range(MAX_ENDS):
        world.upkeep.ended(died := world.now, "ended with exit status 3")
        while not world.look(LOOK_S):
            pass
        pauses.append(world.now - died)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    world.upkeep.ended(world.now, "ended with exit status 3")
    assert world.upkeep.state is WatchState.GIVEN_UP
    assert "not started any more" in (world.upkeep.trouble or "")
    assert world.look(100, moving=True) == []
    assert world.upkeep.state is WatchState.GIVEN_UP


def test_rare_ends_never_add_up() -> None:
    world = World()
    for _ in range(3 * MAX_ENDS):
        assert Deed.START in world.look(1)
        world.look(WINDOW_S, moving=True)
        world.upkeep.ended(world.now, "was killed by SIGKILL")
    assert world.upkeep.state is WatchState.DOWN


def test_external_is_neither_started_nor_killed() -> None:
    world = World(WatchMode.EXTERNAL)
    assert world.look(START_S + 1) == []
    assert "elastic-watchdog run" in (world.upkeep.trouble or "")
    assert world.look(1, moving=True) == []
    assert world.upkeep.trouble is None
    assert world.look(STALE_S + 1) == []
    assert world.upkeep.state is WatchState.DOWN
    assert world.look(1, moving=True) == []
    assert world.upkeep.state is WatchState.ALIVE


def test_off_is_off() -> None:
    world = World(WatchMode.OFF)
    assert world.look(100) == []
    assert (world.upkeep.state, world.upkeep.trouble) == (WatchState.OFF, None)
