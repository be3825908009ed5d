"""Print this machine's GPUs by index, as the driver lists them: `python -m watchdog.gpu_list`.

    [{"index": 0, "uuid": "GPU-…"}, ...]

For a process that must not call the driver itself; give it a deadline. Ends with 3 and one line on standard error
when NVML does not answer.
"""

from __future__ import annotations

import json
import sys

import pynvml as nv


def main() -> int:
    try:
        nv.nvmlInit()
        found = []
        for index in range(nv.nvmlDeviceGetCount()):
            uuid = nv.nvmlDeviceGetUUID(nv.nvmlDeviceGetHandleByIndex(index))
            found.append({"index": index, "uuid": uuid.decode() if isinstance(uuid, bytes) else uuid})
    except nv.NVMLError as error:
        print(f"NVML: {error}", file=sys.stderr)
        return 3
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
