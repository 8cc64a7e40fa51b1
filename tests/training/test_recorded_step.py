"""Steps replayed from a record are the steps that they stand for.

There is no GPU here, so a record is played by the CPU: a list of the operations that a step took, run again over the
same memory. As with a CUDA graph, what Python decided while it was recorded is decided for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import unnorm
from tests.conftest import Saved
from tests.massive import GPT2, with_massive
from unnorm.runs.plan import Plan
from unnorm.training import losses
from unnorm.training.recorded_step import WARM_UP, RecordedStep


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph; `replays` and `recording` are shared by all of them."""

    replays, recording = 0, False

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Recording a CUDA graph runs nothing, so what was written is as it was before."""
        for value, before in reversed(self.overwritten):
            value.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        Tape.replays += 1
        for func, args, kwargs, out in self.operations:
            new = func(*args, **kwargs)
            if not any(returned.alias_info for returned in func._schema.returns):
                for old_part, new_part in zip(_parts(out), _parts(new), strict=True):
                    old_part.copy_(new_part)


def _parts(out: Any) -> list[Tensor]:
    return [part for part in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(part, Tensor)]


@contextmanager
def taping(tape: Tape, **_: Any) -> Iterator[None]:
    Tape.recording = True
    try:
        with tape:
            yield
    finally:
        Tape.recording = False
        with torch.no_grad():
            tape.undo()


@pytest.fixture(autouse=True)
def _taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", taping)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Tape.recording)
    monkeypatch.setattr(Tape, "replays", 0)


def trained(batches: list[Tensor], phases: list[int], ask: bool, record: bool) -> tuple[list[float], Tensor]:
    """Losses and weights of a linear layer; the phase is a factor, and `asked` sums what the batches were."""
    torch.manual_seed(0)
    model, asked, phase = nn.Linear(3, 2), torch.zeros(()), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(inputs: dict[str, Tensor]) -> Tensor:
        asked.add_(inputs["x"].sum())
        if ask:
            asked.item()
        loss = (phase * model(inputs["x"]) - 1).square().mean()
        loss.backward()
        return loss.detach()

    recorded = RecordedStep(step, list(model.parameters()))
    found = []
    for batch, phase in zip(batches, phases, strict=True):
        loss = recorded(phase, {"x": batch}) if record else step({"x": batch})
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return [*found, float(asked)], model.weight.detach().clone()


@pytest.mark.parametrize("ask", [False, True])
def test_losses_weights_and_sums_are_the_same(ask: bool) -> None:
    """Over two shapes and two phases, each recorded anew; or never, where a step has to know a value."""
    batches = [*torch.randn(14, 4, 3), *torch.randn(6, 5, 3)]
    phases = [1] * 7 + [2] * 13
    expected, weight = trained(batches, phases, ask, record=False)
    found, found_weight = trained(batches, phases, ask, record=True)
    assert found == expected
    assert torch.equal(found_weight, weight)
    assert Tape.replays == (0 if ask else 20 - 3 * WARM_UP)


def test_a_step_that_cannot_be_recorded_is_tried_once() -> None:
    tried = 0

    def step(inputs: dict[str, Tensor]) -> Tensor:
        nonlocal tried
        tried += 1
        float(inputs["x"].sum())
        return inputs["x"].sum()

    recorded = RecordedStep(step, [])
    for _ in range(WARM_UP + 4):
        recorded(None, {"x": torch.ones(2)})
    assert not recorded.possible
    assert tried == WARM_UP + 4 + 1


@pytest.mark.parametrize("massive", [False, True])
def test_a_run_is_the_same(
    tiny_model: PreTrainedModel,
    saved: Saved,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    massive: bool,
) -> None:
    """From its first step until after its norms are gone; with massive activations first tokens are learned then."""
    model = with_massive(tiny_model, GPT2) if massive else tiny_model
    saved(model)
    monkeypatch.setattr(losses, "_parts", lambda logits, *more: losses._parts_unasked(*logits.shape, *more))

    def run(name: str) -> dict[str, Any]:
        return unnorm.remove(
            model=str(tmp_path / "model"), data=str(text_file), tokens=16384, out=tmp_path / name, device="cpu"
        )

    expected = run("usual")
    assert Tape.replays == 0
    monkeypatch.setattr(Plan, "records_steps", True)
    found = run("recorded")
    assert Tape.replays > 16
    for number in ("lnfree_loss", "kl", "fold_max_abs_error"):
        assert found[number] == pytest.approx(expected[number], rel=1e-6)
