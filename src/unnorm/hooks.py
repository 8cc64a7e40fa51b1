"""Recording and editing what modules read and write, with hooks that are removed when a block of code ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks with these handles for the duration of the block."""
    with ExitStack() as kept:
        for handle in handles:
            kept.callback(handle.remove)
        yield


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], copies: bool = False) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Record input and output of each named module in a forward pass inside the context.

    With `copies` they are cloned, since some families later change them in place. For a module that is given no
    tensor, the output is recorded as its input too.
    """
    record: dict[str, tuple[Tensor, Any]] = {}

    def kept(value: Any) -> Any:
        return value.clone() if copies and isinstance(value, Tensor) else value

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), output)
            record[name] = (kept(given), kept(output))

        return hook

    with hooked(model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names):
        yield record


@contextmanager
def replaced_inputs(model: nn.Module, edits: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the context, each named module reads what its function in `edits` returns for its input."""

    def put(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args: (edit(args[0]), *args[1:])

    with hooked(model.get_submodule(name).register_forward_pre_hook(put(edit)) for name, edit in edits.items()):
        yield
