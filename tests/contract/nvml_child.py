"""A process that calls the real pynvml on demand; `python nvml_child.py` is its own other end.

It reads one JSON string a line, Python source, and answers one JSON list a line: ["value", v] or ["error", NVML code].
`n` is pynvml, `gpu(i)` a handle; names that the source binds stay.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Self

WAIT_S = 10.0

RELEASE_S = 0.3
"""A call that has not returned for this long hangs."""

# Functions for the child.
FABRIC = """
def fabric(device, kind):
    info = kind()
    n.nvmlDeviceGetGpuFabricInfoV(device, n.byref(info))
    return [info.state, info.status, info.cliqueId, info.healthMask, getattr(info, "healthSummary", None)]
"""

LISTEN = """
def listen(*indices, types=n.nvmlEventTypeXidCriticalError):
    events = n.nvmlEventSetCreate()
    for index in indices:
        n.nvmlDeviceRegisterEvents(gpu(index), types, events)
    return events

def wait(events, timeout_ms=5000):
    data = n.nvmlEventSetWait_v2(events, timeout_ms)
    return [n.nvmlDeviceGetIndex(data.device), data.eventType, data.eventData]

def drain(events):
    found = []
    try:
        while True:
            found.append(wait(events, 0)[2])
    except n.NVMLError_Timeout:
        return found
"""


class NvmlError(Exception):
    """What pynvml raised in the child; `code` is NVML's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"NVML error {code}")
        self.code = code


class NvmlChild:
    def __init__(self, environment: dict[str, str], *, start: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", __file__, *(path for path in sys.path if path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        self._unread = b""
        if start:
            self("n.nvmlInit()")

    def __call__(self, source: str, wait_s: float = WAIT_S) -> Any:
        """The value of an expression, or None after statements. Raises NvmlError, TimeoutError."""
        self.send(source)
        return self.answer(wait_s)

    def send(self, source: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(source).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, wait_s: float = WAIT_S) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + wait_s
        while b"\n" not in self._unread:
            if not select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"pid {self.process.pid} gave no answer in {wait_s} s")
            read = os.read(self.process.stdout.fileno(), 65536)
            if not read:
                raise AssertionError(f"the child ended with status {self.process.wait(WAIT_S)}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        kind, value = json.loads(line)
        if kind == "error":
            raise NvmlError(value)
        return value

    def restart_nvml(self) -> None:
        self("n.nvmlShutdown(); n.nvmlInit()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def code_of(child: NvmlChild, source: str) -> int:
    """The NVML error that this raises in the child."""
    try:
        answer = child(source)
    except NvmlError as error:
        return error.code
    raise AssertionError(f"{source} raised nothing and gave {answer!r}")


def main() -> None:
    sys.path[:] = sys.argv[1:]
    import pynvml

    names: dict[str, Any] = {"n": pynvml, "time": time, "gpu": pynvml.nvmlDeviceGetHandleByIndex}
    for line in sys.stdin:
        source = json.loads(line)
        try:
            try:
                answer = ["value", eval(compile(source, "<test>", "eval"), names)]
            except SyntaxError:
                exec(compile(source, "<test>", "exec"), names)
                answer = ["value", None]
        except pynvml.NVMLError as error:
            answer = ["error", error.value]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
