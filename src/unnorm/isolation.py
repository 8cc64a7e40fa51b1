"""Isolation of public functions: they leave the global state of the calling process unchanged."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging

from unnorm import processes
from unnorm.errors import cant_be_used
from unnorm.progress import Watch

P = ParamSpec("P")
T = TypeVar("T")


class _WatchError(BaseException):
    """Carries an exception from the caller's `watch` past handlers that would treat it as an error of their own."""

    def __init__(self, raised: Exception) -> None:
        super().__init__(str(raised))
        self.raised = raised


_LOCK = threading.RLock()
_DEPTH = threading.local()
"""How many times this thread holds the lock."""


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time, and the CPU as torch's default device.

    transformers changes global state while it loads a model: classes' methods, the default dtype.
    """
    with _LOCK:
        _DEPTH.value = getattr(_DEPTH, "value", 0) + 1
        try:
            with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
                yield
        finally:
            _DEPTH.value -= 1


@contextmanager
def _others_let_in() -> Iterator[None]:
    """Let other threads run while a caller's function runs, which may wait for one of them."""
    times, _DEPTH.value = getattr(_DEPTH, "value", 0), 0
    for _ in range(times):
        _LOCK.release()
    try:
        yield
    finally:
        for _ in range(times):
            _LOCK.acquire()
        _DEPTH.value = times


def isolated(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function independent of the mode it is called in, and restore global state after it.

    Gradients work even when called within `torch.no_grad()` or `torch.inference_mode()`, autocast is off, and float32
    is float32, not TF32. The random states of Python, NumPy and torch are restored, as are float32 precision,
    transformers' verbosity and accelerate's state. One thread at a time runs such functions. A path that can't be used
    is an `UnnormError`. Exceptions raised by `watch` reach the caller unchanged.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs.get("watch") is not None:
            kwargs["watch"] = _passing_on(kwargs["watch"])  # type: ignore[arg-type]
        try:
            with alone(), _state_kept(), _no_autocast(), torch.inference_mode(False), torch.enable_grad():
                return function(*args, **kwargs)
        except _WatchError as error:
            if getattr(_DEPTH, "value", 0):  # Only the outermost call may unwrap it: others would change it.
                raise
            raise error.raised from None
        except OSError as error:
            said = cant_be_used(error)
            if said is None:
                raise
            raise said from error

    return call


def _passing_on(watch: Watch) -> Watch:
    def call(row: dict[str, Any]) -> None:
        try:
            with _others_let_in():
                watch(row)
        except Exception as error:
            raise _WatchError(error) from error

    return call


@contextmanager
def _no_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _accelerate_kept() -> Iterator[None]:
    """Restore the settings that all Accelerators of a process share: a Trainer replaces the caller's."""
    if processes.count() > 1:  # Of a launch of its own, whose processes stay connected.
        yield
        return
    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, was in zip(shared, before, strict=True):
            state.clear()
            state.update(was)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32, not TF32 or bfloat16, whatever the caller chose for them."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    places += [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    of_all = torch.backends.fp32_precision
    torch.backends.fp32_precision = "none"  # What a place says now is its own choice, not that for all.
    own = [place.fp32_precision for place in places]
    torch.backends.fp32_precision = "ieee"
    differing = [(place, choice) for place, choice in zip(places, own, strict=True) if place.fp32_precision != "ieee"]
    for place, _ in differing:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, choice in differing:
            place.fp32_precision = choice
        torch.backends.fp32_precision = of_all


@contextmanager
def _state_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    verbosity = logging.get_verbosity()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), _accelerate_kept(), _whole_float32():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        logging.set_verbosity(verbosity)
