"""Where a model runs, and how much memory is free and used there."""

import gc
import sys
from contextlib import suppress
from pathlib import Path

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


def reset_peak_memory(device: str) -> None:
    """Let the peak be that of what follows; on macOS and Windows the CPU's stays that of the process so far."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size.


def peak_memory_mb(device: str) -> float:
    """Peak memory since the last reset: torch's on a GPU, otherwise the process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    from resource import RUSAGE_SELF, getrusage  # Windows has no such module.

    return getrusage(RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself; others convert each number, and take ten times as long."""
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))


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
        one_of_several = "" if device.partition(":")[0] not in present else " (one of several: CUDA_VISIBLE_DEVICES)"
        raise UnnormError(f"No device '{device}' here. Choose from {', '.join(present)}{one_of_several}.")
    return device
