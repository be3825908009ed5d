"""Print this machine's GPUs by index, as the driver lists them: `python -m watchdog.gpu_list`.

    {"count": 8}
    {"index": 0, "uuid": "GPU-…", "slot": "00000000:01:00.0"}    slot: null where the driver does not tell
    {"index": 3, "error": "GPU is lost"}

One line for each GPU, as soon as it has answered; one that hangs has none, and hides no other. For a process that must
not call the driver itself: give it a deadline, and use what has come by then. Ends with 3 and one line on standard
error when NVML as a whole does not answer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import pynvml as nv

from watchdog.nvml import slot_of, text


def say(**fields: Any) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")  # in one piece: threads share the pipe


def tell(index: int) -> None:
    try:
        handle = nv.nvmlDeviceGetHandleByIndex(index)
        uuid = text(nv.nvmlDeviceGetUUID(handle))
    except nv.NVMLError as error:
        return say(index=index, error=str(error))
    say(index=index, uuid=uuid, slot=slot_of(handle))


def main() -> int:
    try:
        nv.nvmlInit()
        count = nv.nvmlDeviceGetCount()
    except nv.NVMLError as error:
        print(f"NVML: {error}", file=sys.stderr)
        return 3
    say(count=count)
    # NVML may be called by many threads at once; one that hangs does not keep this process when it is killed.
    threads = [threading.Thread(target=tell, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
