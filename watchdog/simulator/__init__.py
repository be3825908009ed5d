"""A simulated NVIDIA driver: a real `libnvidia-ml.so.1`, which the unmodified `pynvml` loads, and its GPUs' state.

    create(runtime_dir, gpus=4)                          # in the daemon: one simulated GPU per CPU rank
    Popen(command, env={**os.environ, **driver_environment(runtime_dir)})  # a child that calls NVML
    Simulator.open(runtime_dir).xid("GPU-…", 79)         # anywhere: a fault, seen by every such child

Nothing here loads that library into the calling process: vLLM would take a process that can see it for a CUDA machine.
What the driver answers to which fault is in `native/state.h`, with the layout of the state file.
"""

from watchdog.simulator.errors import BuildError, NoState, NotBuilt, SimulatorError, UnknownGpu
from watchdog.simulator.layout import MAX_GPUS, NVLINKS, Feature
from watchdog.simulator.library import build_libraries, library_dir
from watchdog.simulator.records import GpuState, Throttle
from watchdog.simulator.simulator import UNKNOWN_ERROR, Simulator, create, driver_environment

__all__ = [
    "MAX_GPUS",
    "NVLINKS",
    "UNKNOWN_ERROR",
    "BuildError",
    "Feature",
    "GpuState",
    "NoState",
    "NotBuilt",
    "Simulator",
    "SimulatorError",
    "Throttle",
    "UnknownGpu",
    "build_libraries",
    "create",
    "driver_environment",
    "library_dir",
]
