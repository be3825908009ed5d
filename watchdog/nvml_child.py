"""A process that calls NVML, so that the watchdog need not: `python -m watchdog.nvml_child ROLE ...`.

    events   waits for the driver's events
    poll     reads all GPUs at an interval, or one (`--only UUID`)

It is expendable: a driver call that never returns takes this process and nothing else. It writes one JSON object a line
to standard output, `t` says which:

    opened       {driver, count, gpus: [{index, uuid, name, slot, missing}], unreadable: {gpu: error},
                 deaf: {gpu: error}}
                 at start and again; `deaf`: GPUs whose events could not be asked for
    deaf         {}; no event is waited for until `opened` comes again: NVML keeps none for later
    poll         {gpus: {uuid: reading}, slow: {uuid: seconds}}; readings (see nvml.py) that changed
    event        {gpu, signal, data, at}; `at` is CLOCK_MONOTONIC seconds
    broken       {error}; waiting for events failed, NVML is initialised again
    failed       {error}; NVML does not work at all; the process then ends with 3

and reads commands, one a line: `now` (poll at once), `skip GPU,GPU` (initialise NVML again, and leave these alone),
`expect GPU,GPU` (ranks are bound to these: look for those that are not there).
It ends at end of file, and with its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import pynvml as nv

from watchdog.call_page import CallPage
from watchdog.memory import give_back
from watchdog.nvml import Driver, Gpu, Trouble
from watchdog.parent import die_with_parent
from watchdog.reopening import REOPEN_S, Reopening

SLOW_POLL_S = 1.0
"""Interval of the signals that change slowly."""
EVENT_WAIT_MS = 500
TELL_SLOW_S = 0.1
"""A GPU whose reading takes longer is named."""


def send(kind: str, **fields: Any) -> None:
    line = json.dumps({"t": kind, **fields}, separators=(",", ":")).encode() + b"\n"
    while line:
        line = line[os.write(1, line) :]


class Commands:
    """Standard input, line by line."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._rest = b""

    def wait(self, seconds: float) -> list[str]:
        """Commands that have come, at the latest after this time. Ends the process at end of file."""
        if not self._poll.poll(max(0.0, seconds) * 1000):
            return []
        chunk = os.read(0, 4096)
        if not chunk:
            sys.exit(0)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode() for line in lines]


class Child:
    """What both roles share: an open driver and when to open it again."""

    def __init__(self, page: CallPage, known: set[str], skip: set[str], only: str | None) -> None:
        self._page = page
        self._known = known
        self._skip = skip
        self._only = only
        self._commands = Commands()
        self._open_driver()
        give_back()

    def _open_driver(self) -> None:
        started = time.monotonic()
        self.driver = Driver(self._page, self._known, self._skip, self._only)
        self._open_took_s = time.monotonic() - started
        self._known |= {gpu.uuid for gpu in self.driver.gpus}

    def open(self) -> None:
        """Initialise NVML (again)."""
        self.driver.close()
        self._open_driver()

    def announce(self, deaf: Mapping[str, str] | None = None) -> None:
        driver = self.driver
        gpus = [
            {
                "index": gpu.index,
                "uuid": gpu.uuid,
                "name": gpu.name,
                "slot": gpu.slot,
                "missing": sorted(gpu.missing),
            }
            for gpu in driver.gpus
        ]
        send(
            "opened",
            driver=driver.version,
            count=driver.count,
            gpus=gpus,
            unreadable=driver.unreadable,
            deaf=deaf or {},
        )

    def obey(self, commands: list[str]) -> bool:
        """Whether NVML must be opened again."""
        again = False
        for command in commands:
            word, _, argument = command.partition(" ")
            if word == "skip":
                self._skip = gpu_set(argument)
                again = True
            elif word == "expect":
                self.expect(gpu_set(argument))
        return again

    def expect(self, gpus: set[str]) -> None:
        """Ranks are bound to these: whichever was never seen is missing all the same."""
        self._known |= gpus


class EventsChild(Child):
    def run(self) -> None:
        while True:
            events, wrong = self.driver.event_set()
            self.announce(wrong)
            opened = time.monotonic()
            by_address = {gpu.address: gpu for gpu in self.driver.gpus}
            retry_at = time.monotonic() + REOPEN_S[1] if wrong or self.driver.unreadable else None
            while not self.obey(self._commands.wait(0)):
                try:
                    found = self.driver.wait(events, EVENT_WAIT_MS)
                except nv.NVMLError as error:  # a GPU is lost; or worse, which the next initialisation will tell
                    send("broken", error=str(error))
                    if time.monotonic() - opened < REOPEN_S[0]:  # again: do not spin
                        self.obey(self._commands.wait(REOPEN_S[0]))
                    break
                if found is not None:
                    address, name, data = found
                    gpu = by_address.get(address)
                    send("event", gpu=gpu.uuid if gpu else None, signal=name, data=data, at=time.monotonic())
                self._page.count_cycle()
                if retry_at is not None and time.monotonic() > retry_at:
                    break
            send("deaf")
            self.obey(self._commands.wait(0))  # what must be left alone has priority
            self.open()


class PollChild(Child):
    def __init__(self, page: CallPage, known: set[str], skip: set[str], only: str | None, interval: float) -> None:
        super().__init__(page, known, skip, only)
        self._interval = interval
        self._reopening = Reopening()
        self._readings: dict[str, dict[str, Any]] = {}
        self._slow_at = 0.0

    def expect(self, gpus: set[str]) -> None:
        super().expect(gpus)
        self._reopening.expect(len(gpus))

    def run(self) -> None:
        announced = False
        due = time.monotonic()
        while True:
            now = time.monotonic()
            slow = now >= self._slow_at
            if slow:
                self._slow_at = now + SLOW_POLL_S
            gone, present = self._poll_all(slow)
            if slow and not announced:  # what is not supported is known only now
                self.announce()
                announced = True
            self._page.count_cycle()
            due = max(due + self._interval, time.monotonic())
            commands = self._commands.wait(due - time.monotonic())
            if "now" in commands:
                due = time.monotonic()
            # Handles stay bound to the GPUs that were there.
            missing = self._reopening.due(gone, present, self._open_took_s, time.monotonic())
            if self.obey(commands) or missing:
                self.open()
                self._slow_at = 0.0
                announced = False

    def _poll_all(self, slow: bool) -> tuple[set[str], int]:
        """Send what changed. Returns the GPUs that are gone, and how many are not."""
        changed: dict[str, dict[str, Any]] = {}
        took: dict[str, float] = {}
        present = set()
        gone = set(self.driver.unreadable)
        for gpu in self.driver.gpus:
            started = time.monotonic()
            reading = self._poll(gpu, slow)
            if (seconds := time.monotonic() - started) > TELL_SLOW_S:
                took[gpu.uuid] = round(seconds, 3)
            present.add(gpu.uuid)
            if reading["status"] == "lost":
                gone.add(gpu.uuid)
            if reading != self._readings.get(gpu.uuid):
                self._readings[gpu.uuid] = changed[gpu.uuid] = reading
        if changed or took or slow:
            send("poll", gpus=changed, slow=took)
        expected = {self._only} if self._only else self._known - self._skip
        return gone | expected - present, len(present - gone)

    def _poll(self, gpu: Gpu, slow: bool) -> dict[str, Any]:
        before = self._readings.get(gpu.uuid, {})
        try:
            reading = {**before, **gpu.read_fast()}
            reading.pop("error", None)
            if slow:
                reading.update(gpu.read_slow())
            return reading
        except Trouble as trouble:
            reading = {**before, "status": trouble.status, "error": str(trouble)}
            if trouble.status == "reset_required" and "recovery" not in gpu.missing:
                self._read_recovery(gpu, reading)
            return reading

    def _read_recovery(self, gpu: Gpu, reading: dict[str, Any]) -> None:
        """A GPU that must be reset still says what must be done."""
        try:
            self._page.enter("fields", gpu.uuid)
            value = nv.nvmlDeviceGetFieldValues(gpu.handle, [nv.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])[0]
            if value.nvmlReturn == nv.NVML_SUCCESS:
                reading["recovery"] = int(value.value.uiVal)
        except nv.NVMLError:
            pass  # its status says enough
        finally:
            self._page.leave()


def gpu_set(text: str) -> set[str]:
    return {gpu for gpu in text.split(",") if gpu}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m watchdog.nvml_child")
    parser.add_argument("role", choices=["events", "poll"])
    parser.add_argument("--page-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--interval", type=float, default=0.25)
    parser.add_argument("--known", type=gpu_set, default="", help="UUIDs that have been seen before")
    parser.add_argument("--skip", type=gpu_set, default="")
    parser.add_argument("--only")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends its children
    page = CallPage(arguments.page_fd)
    gpus = (arguments.known, arguments.skip, arguments.only)
    try:
        if arguments.role == "events":
            EventsChild(page, *gpus).run()
        else:
            PollChild(page, *gpus, arguments.interval).run()
    except nv.NVMLError as error:
        send("failed", error=str(error))
        sys.exit(3)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
