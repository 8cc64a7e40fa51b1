"""Where a model runs, and how much memory is free there."""

import gc

import psutil
import torch

from unnorm.errors import UnnormError


def free_memory(device: str) -> int:
    """Bytes of memory that are free on the device, with what earlier work left in it given back."""
    gc.collect()  # A Trainer and its callbacks hold each other.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def choose_device(device: str) -> str:
    """The device a run takes place on.

    Raises:
        UnnormError: it is not on this machine.
    """
    present = ["cpu"]
    present += ["cuda"] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cuda" if "cuda" in present else "cpu"  # Nothing was ever run on Apple GPUs.
    if device not in present:
        raise UnnormError(f"No device '{device}' here. There is: {', '.join(present)}.")
    return device
