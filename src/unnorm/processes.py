"""One run on several processes, as `torchrun` or `accelerate launch` start them."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from unnorm.errors import UnnormError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=2)
"""For the main process, which reads and tokenizes the text, evaluates and proves while all others wait."""


def count() -> int:
    """Processes in this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def join(device: str) -> None:
    """Meet the other processes of the launch, if there are any; gloo on the CPU, the device's own backend else."""
    if count() > 1 and not dist.is_initialized():
        backend = {"backend": "gloo"} if device == "cpu" else {}
        PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT, **backend)


def agree(make: Callable[[], T]) -> T:
    """What `make` returns on the main process, on every process; so is the UnnormError that it raises."""
    if not dist.is_initialized():
        return make()
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = make()
        except UnnormError as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if isinstance(answer[1], UnnormError):
        answer[1].told_elsewhere = not is_main()
        raise answer[1]
    return answer[0]


def total(values: Tensor) -> Tensor:
    """Their sum over all processes, as a new tensor."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """Those of all processes one after the other, along the first dimension."""
    if not dist.is_initialized():
        return values
    of_all = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, values.contiguous())
    return torch.cat(of_all)


def leave() -> None:
    """Close the connections to the other processes.

    A gloo thread that lets go of a tensor while the interpreter shuts down aborts the process, so its threads must
    have ended by then. They end with the last reference to the group, and reference cycles (DDP, the Trainer) hold it.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
