"""On a GPU, a training step is thousands of small kernels, which take longer to launch than to run.

So forward and backward are recorded once as a CUDA graph and replayed as a whole, as long as the shapes and the phase
of the removal stay the same.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Steps that run as usual before one is recorded, so that libraries have done their first-use setup."""


class RecordedStep:
    """Forward and backward of a step, recorded and replayed.

    The step may read only its inputs and tensors that keep their place in memory; what it decides in Python is decided
    once for each phase. If it cannot be recorded because it needs a value on the CPU, as some mixtures of experts do,
    steps run as usual.

    Attributes:
        possible: False once recording has failed.
    """

    def __init__(self, step: Callable[[dict[str, Tensor]], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Start with nothing recorded.

        Args:
            step: returns the loss of a batch, and leaves its gradients in the parameters, which must have none before.
            parameters: the parameters that it trains.
        """
        self.step, self.parameters = step, parameters
        self.possible = True
        self._key: Hashable = None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, phase: Hashable, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of a batch; its gradients are then in the parameters."""
        key = phase, tuple((name, value.shape) for name, value in inputs.items())
        if key != self._key:
            self._forget()
            self._key = key
        if self._graph is None:
            self._runs += 1
            if not self.possible or self._runs <= WARM_UP or not self._record(inputs):
                return self.step(inputs)
        assert self._graph is not None and self._loss is not None
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _forget(self) -> None:
        self._graph, self._inputs, self._loss, self._gradients, self._runs = None, {}, None, [], 0

    def _record(self, inputs: dict[str, Tensor]) -> bool:
        """Record a step without running it; return whether that worked."""
        graph = torch.cuda.CUDAGraph()
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        try:
            # Earlier steps ran on another stream. The warning asks for their gradients to be gone, and they are.
            with warnings.catch_warnings(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
                self._loss = self.step(self._inputs)
            self._graph, self._gradients = graph, [parameter.grad for parameter in self.parameters]
        except RuntimeError:
            self._forget()
            self.possible = False
        for parameter in self.parameters:
            parameter.grad = None
        return self.possible
