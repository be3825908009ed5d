"""Which device a rank uses, and what the driver calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"


def choose_device(uuid: str | None, index: int, visible: str | None) -> tuple[int, dict[str, str]]:
    """The index of a fork's device, and the variables it needs before it first touches CUDA. Pure.

    Each process counts GPUs anew, so that an index means another GPU once one is gone: a rank sees its own GPU alone,
    by UUID. `index` serves where no UUID is known; `visible`: CUDA_VISIBLE_DEVICES as it is.
    """
    if uuid is not None:
        return 0, {VISIBLE: uuid}
    names = [name.strip() for name in (visible or "").split(",")]
    if index < len(names) and names[index].startswith(("GPU-", "MIG-")):
        return 0, {VISIBLE: names[index]}
    return index, {ORDER: "PCI_BUS_ID"}  # as NVML counts; CUDA's own default is the fastest first


def uuid_of(device: torch.device) -> str | None:
    """As NVML calls the GPU, None on CPU. Initializes CUDA."""
    if device.type != "cuda":
        return None
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid is not None else None
