"""What the kernel says about the process that owns a page."""

from __future__ import annotations

from watchdog.heartbeat.layout import ProcessState

_STATES = {
    b"T": ProcessState.STOPPED,
    b"t": ProcessState.STOPPED,
    b"D": ProcessState.UNINTERRUPTIBLE,
    b"Z": ProcessState.GONE,
    b"X": ProcessState.GONE,
}


def start_time(pid: int) -> int:
    """When a process started, in clock ticks after boot: with it, a pid that was used again is not mistaken.

    Raises OSError when there is no such process.
    """
    return int(_stat_after_name(pid)[19])


def process_state(pid: int, started: int) -> ProcessState:
    """State of the main thread of the process with this pid and start time."""
    try:
        fields = _stat_after_name(pid)
    except (FileNotFoundError, ProcessLookupError):
        return ProcessState.GONE
    except OSError:
        return ProcessState.RUNNING  # it cannot be read: the page itself must tell
    if int(fields[19]) != started:
        return ProcessState.GONE
    return _STATES.get(fields[0], ProcessState.RUNNING)


def _stat_after_name(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat (proc_pid_stat(5)) from the third, the state, on. The second may hold any character."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
        return stat.read(1024).rpartition(b")")[2].split()
