"""Where a model runs, and how much memory is free there."""

import gc

import psutil
import torch

from unnorm.errors import UnnormError


def free_memory(device: str) -> int:
    """Free memory on the device, in bytes, after releasing what earlier work left there."""
    gc.collect()  # A Trainer and its callbacks reference each other.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def choose_device(device: str | torch.device) -> str:
    """The device that a run uses.

    Raises:
        UnnormError: this machine does not have it.
    """
    device, present = str(device), ["cpu"]
    present += ["cuda"] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cuda" if "cuda" in present else "cpu"  # Apple GPUs are untested.
    if device not in present:
        raise UnnormError(f"No device '{device}' here. Choose from {', '.join(present)}.")
    return device
