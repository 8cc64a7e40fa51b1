"""Hooks that are removed when a block of code ends, however it ends."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks with these handles for the duration of the block."""
    with ExitStack() as kept:
        for handle in handles:
            kept.callback(handle.remove)
        yield
