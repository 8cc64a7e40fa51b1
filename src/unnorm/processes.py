"""One run on several processes, started by `torchrun` or `accelerate launch`."""

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
"""Timeout of collectives: the others wait while the main process tokenizes the text, evaluates and proves."""


def count() -> int:
    """Number of processes in this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """Number of its processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def join(device: str) -> None:
    """Connect to the other processes, if there are any: with gloo on the CPU, otherwise with the device's backend.

    Raises:
        UnnormError: the launch shards models, or has more processes than there are GPUs.
    """
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise UnnormError(
                f"Models sharded by {kind} are not supported: each process holds the whole model. Use torchrun, or "
                "accelerate launch --multi_gpu."
            )
    here, gpus = count_here(), torch.cuda.device_count()
    if device == "cuda" and count() > 1 and here > gpus:
        raise UnnormError(
            f"{here} processes on this machine, but {gpus} GPUs. Start as many processes as there are GPUs."
        )
    if count() > 1 and not dist.is_initialized():
        backend = {"backend": "gloo"} if device == "cpu" else {}
        PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT, **backend)


def agree(make: Callable[[], T]) -> T:
    """Run `make` on the main process only, and return its result, or raise its UnnormError, on every process."""
    if not dist.is_initialized():
        return make()
    answer: list[Any] = [None, None]
    failed: Exception | None = None
    if is_main():
        try:
            answer[0] = make()
        except Exception as error:  # The others wait for an answer, whatever it is.
            failed = error
            answer[1] = error if isinstance(error, UnnormError) else UnnormError("The first process failed.")
    dist.broadcast_object_list(answer)
    if failed is not None:
        raise failed
    if answer[1] is not None:
        answer[1].told_elsewhere = True
        raise answer[1]
    return answer[0]


def together(make: Callable[[], T]) -> T:
    """Run `make` on every process and return its result; if it raises an UnnormError on any, raise the first on all."""
    if not dist.is_initialized():
        return make()
    made: list[T] = []
    error: UnnormError | None = None
    try:
        made.append(make())
    except UnnormError as raised:
        error = raised
    errors: list[UnnormError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for index, found in enumerate(errors):
        if found is not None:
            found.told_elsewhere = rank() != index
            raise found
    return made[0]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, as a new tensor."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, as a new tensor."""
    return total(values) / (dist.get_world_size() if dist.is_initialized() else 1)


def gathered(values: Tensor) -> Tensor:
    """The tensors of all processes, concatenated along the first dimension."""
    if not dist.is_initialized():
        return values
    of_all = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, values.contiguous())
    return torch.cat(of_all)


def leave() -> None:
    """Close the connections to the other processes.

    A gloo thread that releases a tensor during interpreter shutdown aborts the process, so these threads must have
    ended by then. They end with the last reference to the group, which reference cycles (DDP, the Trainer) keep alive.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
