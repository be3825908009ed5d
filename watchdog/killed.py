"""Children that were killed and have not ended. One that is stuck in the kernel survives SIGKILL, maybe for ever."""

from __future__ import annotations

from watchdog.child import Child


class Killed:
    """By the GPU that they may be stuck at, or by their role where it is none. All are kept: two children of different
    roles can be caught by one GPU."""

    def __init__(self, reap_s: float, starved_s: float) -> None:
        """`reap_s`: a child that is there so long after SIGKILL is stuck; `starved_s`: also one without a processor."""
        self._reap_s = reap_s
        self._starved_s = starved_s
        self._children: list[tuple[str, Child]] = []

    def __contains__(self, key: str) -> bool:
        """A child that was killed there has not ended: no other may go there."""
        return any(one == key for one, _ in self._children)

    def add(self, key: str, child: Child) -> None:
        self._children.append((key, child))

    def remove(self, child: Child) -> None:
        """It has ended."""
        self._children = [(key, one) for key, one in self._children if one is not child]

    def stuck(self, now: float) -> dict[str, tuple[int, ...]]:
        """Pids of those that survived SIGKILL."""
        found: dict[str, tuple[int, ...]] = {}
        for key, child in self._children:
            if self._is_stuck(child, now):
                found[key] = (*found.get(key, ()), child.pid)
        return found

    def close(self) -> None:
        """Let go of them all."""
        for _, child in self._children:
            child.close()
        self._children.clear()

    def _is_stuck(self, child: Child, now: float) -> bool:
        if child.killed is None or now - child.killed <= self._reap_s:
            return False
        return now - child.killed > self._starved_s or not child.starved()
