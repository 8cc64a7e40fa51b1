"""The module that stands in for a norm while it is tapered."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unnorm.models.linear import linear_weight
from unnorm.sites.norm_behaviour import centered, log_scale_of

Estimator = Literal["geometric", "mean", "least-squares"]
Interpolation = Literal["log", "linear", "bounded"]

MOMENTUM = 0.9
"""Share of the old constant that is kept when an optimizer step's tokens update the running estimate."""
CEILING = 10.0
"""In training, a bounded stand-in gives no token more than this many times what the norm would give it."""


def estimate_log_constant(
    log_scale: Float[Tensor, "*tokens"], weight: Float[Tensor, "*tokens"], estimator: Estimator
) -> Float[Tensor, ""]:
    """Log of the constant that replaces many tokens' scales s, each token weighted by `weight`.

    - `geometric` (default): exp(E[log s]), the constant nearest to all scales in log space, where the taper
      interpolates. It is affected least by massive activations.
    - `mean`: E[s], the papers' "average std" (arXiv 2409.13710).
    - `least-squares`: E[s^2] / E[s], which minimizes E|x/s - x/c|^2, the error of the readers' input. The longest
      vectors dominate it.
    """
    weight = weight / weight.sum()
    if estimator == "geometric":
        return (weight * log_scale).sum()
    # Scales relative to the largest, so that no square overflows.
    top = log_scale.max()
    scale = torch.exp(log_scale - top)
    mean = (weight * scale).sum()
    if estimator == "mean":
        return top + mean.log()
    return top + (weight * scale.square()).sum().log() - mean.log()


class TokenMask:
    """Which tokens of the current batch are divided by the special constant (position 0, end-of-text).

    All stand-ins of a model share one object; a mask of None means that no token is special.
    """

    def __init__(self) -> None:
        self.mask: Bool[Tensor, "batch position"] | None = None


class TaperedNorm(nn.Module):
    """A LayerNorm or RMSNorm on its way to an affine map.

    With s(x) the scale of the token, c the constant scale, and x centered first for LayerNorm,

        y = gain * x / (s(x)^(1 - alpha) * c^alpha) + bias

    so alpha = 0 is the norm and alpha = 1 is affine in x. This is the `log` interpolation, in log scale; there are two
    others. With `linear`, as in TaperNorm, x is multiplied by (1 - alpha) / s(x) + alpha / c. With `bounded`, x is
    divided by c, but no token gets more than 1 / (1 - alpha) times what the norm would give it, nor less than 1 - alpha
    times: ordinary tokens lose their norm first, massive activations last, and meanwhile no token can grow from layer
    to layer. In training a bounded stand-in, even at alpha = 1 and once removed, gives no token more than `CEILING`
    times what the norm would give it: a token that runs away overflows, and a step that overflows teaches nothing.

    A stand-in with two `paths` (query/key and value, which arXiv 2409.13710 removes one after the other) has an alpha
    for each and returns both outputs, concatenated along the last dimension; `PathReader` separates them.
    """

    gain: Float[Tensor, "*heads width"]
    alpha: Float[Tensor, " paths"]
    log_constant: Float[Tensor, "2"]

    def __init__(
        self,
        gain: Float[Tensor, "*heads width"],
        bias: Float[Tensor, " width"] | None,
        eps: float,
        centered: bool,
        paths: int = 1,
        token_mask: TokenMask | None = None,
        interpolation: Interpolation = "log",
        fixed_gain: bool = False,
    ) -> None:
        """Start as the exact norm, with constant scale 1.

        Args:
            gain: what the norm multiplies by (1 + w if the norm stores w and multiplies by 1 + w); query and key norms,
                which get every head's features, may have one gain per head.
            bias: what it adds, or None.
            eps: added to the variance or mean square, inside the root.
            centered: True for LayerNorm, False for RMSNorm.
            paths: number of alphas; see the class.
            token_mask: marks the special tokens, if they have a constant of their own.
            interpolation: of the divisor in log scale, of its inverse, or by bounds; see the class.
            fixed_gain: the norm has no weight, so the gain is not trained: there would be nowhere to store it.
        """
        super().__init__()
        if fixed_gain:
            self.register_buffer("gain", gain.detach().clone())
        else:
            self.gain = nn.Parameter(gain.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.eps = eps
        self.centered = centered
        self.token_mask = token_mask or TokenMask()
        self.estimator: Estimator = "geometric"
        self.momentum = MOMENTUM  # Per training pass; gradient accumulation takes a root of it.
        self.interpolation: Interpolation = interpolation
        self.estimating = False
        self.removed = False
        self.keep_log_scale = self.keep_output = False
        self.kept_log_scale: Float[Tensor, "batch position"] | None = None
        self.kept_output: Float[Tensor, "batch position out"] | None = None
        self.register_buffer("alpha", torch.zeros(paths, dtype=gain.dtype, device=gain.device))
        # [0] is for ordinary tokens, [1] for special ones.
        self.register_buffer("log_constant", torch.zeros(2, dtype=gain.dtype, device=gain.device))

    @property
    def constant(self) -> float:
        """The constant scale of ordinary tokens."""
        return float(self.log_constant[0].cpu().double().exp())

    def log_scale(self, centered_x: Float[Tensor, "batch position width"]) -> Float[Tensor, "batch position 1"]:
        """Log of the scale, computed from what the norm divides (x already centered for LayerNorm)."""
        return log_scale_of(centered_x, self.eps)

    def departure(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token"]:
        """Log scale of what the site reads, minus the log constant."""
        return self.log_scale(self._centered(x)).squeeze(-1) - self.log_constant[0]

    @property
    def held(self) -> Float[Tensor, ""] | None:
        """Share of the last training tokens held down by the bound; None if unbounded, removed or no scale is kept."""
        if self.interpolation != "bounded" or self.removed or self.kept_log_scale is None:
            return None
        departure = self.kept_log_scale.detach() - self.log_constant[0]
        return (departure > _reach(self.alpha)).float().mean()

    @property
    def has_ceiling(self) -> bool:
        """Whether tokens that would run away are held down, which happens only in training."""
        return self.interpolation == "bounded" and self.training

    def forward(self, x: Float[Tensor, "batch position width"]) -> Float[Tensor, "batch position out"]:
        """The class's equation, in the parameters' precision; `out` is `width` times the number of paths."""
        dtype = x.dtype
        x = self._centered(x)
        keeps = self.keep_log_scale and self.training
        if self.removed and not self.has_ceiling:
            if keeps:
                self.kept_log_scale = self.log_scale(x).squeeze(-1)
            factors = [torch.exp(-self._log_constant(x))] * len(self.alpha)
        else:
            log_scale = self.log_scale(x)
            if keeps:
                self.kept_log_scale = log_scale.squeeze(-1)
            if self.estimating and self.training:
                self._update_constants(log_scale.detach().squeeze(-1))
            log_constant = self._log_constant(x)
            alphas = torch.ones_like(self.alpha) if self.removed else self.alpha
            factors = [self._factor(log_scale, log_constant, alpha) for alpha in alphas.unbind()]
        y = torch.cat([self._affine(x * factor) for factor in factors], dim=-1)
        if self.keep_output and self.training:
            self.kept_output = y
        return y.to(dtype)

    def _centered(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        return centered(x.to(self.gain.dtype), self.centered)

    def _factor(
        self, log_scale: Float[Tensor, "batch position 1"], log_constant: Tensor, alpha: Float[Tensor, ""]
    ) -> Float[Tensor, "batch position 1"]:
        if self.interpolation == "linear":
            return torch.lerp(torch.exp(-log_scale), torch.exp(-log_constant).expand_as(log_scale), alpha)
        if self.interpolation == "bounded":
            reach = _reach(alpha)
            most = reach.clamp(max=math.log(CEILING)) if self.has_ceiling else reach
            return torch.exp((log_scale - log_constant).clamp(-reach, most) - log_scale)
        return torch.exp(-(log_scale + alpha * (log_constant - log_scale)))

    def _affine(self, x: Float[Tensor, "batch position width"]) -> Float[Tensor, "batch position width"]:
        x = x * self.gain
        return x if self.bias is None else x + self.bias

    def _log_constant(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token_wise"]:
        mask = self.token_mask.mask
        if mask is None:
            return self.log_constant[0]
        return torch.where(as_scales(mask, x.shape[:-1]).unsqueeze(-1), self.log_constant[1], self.log_constant[0])

    @torch.no_grad()
    def _update_constants(self, log_scale: Float[Tensor, "batch position"]) -> None:
        mask = self.token_mask.mask
        special = torch.zeros_like(log_scale) if mask is None else as_scales(mask, log_scale.shape).to(log_scale.dtype)
        ordinary = estimate_log_constant(log_scale, 1 - special, self.estimator)
        if mask is None:
            new = torch.stack([ordinary, ordinary])
        else:
            new = torch.stack([ordinary, estimate_log_constant(log_scale, special, self.estimator)])
        # Paths share the constant, so once one of them has arrived it stays fixed; TaperNorm's, which the final norm is
        # drawn to, as soon as the gate falls. Batches that overflow must not spoil it: the guard refuses their step,
        # but that does not undo an update made in the forward pass.
        before = self.alpha == 0 if self.interpolation == "linear" else self.alpha < 1
        moving = before.all() & new.isfinite()
        self.log_constant.copy_(torch.where(moving, self.log_constant.lerp(new, 1 - self.momentum), self.log_constant))


def _reach(alpha: Tensor) -> Tensor:
    """How far from the log constant a bounded stand-in lets a log scale be; infinite at alpha = 1."""
    return -torch.log1p(-alpha)


def as_scales(mask: Bool[Tensor, "batch position"], shape: torch.Size) -> Bool[Tensor, "*token_wise"]:
    """A token mask in the shape of a site's scales: with heads before or after positions, or flattened."""
    if len(shape) == 3:
        mask = mask.unsqueeze(2 if shape[1] == mask.shape[1] else 1)
        return mask.expand(shape)
    return mask.view(shape)  # OPT flattens batch and position before its norms.


@contextmanager
def removed(stand_ins: Iterable[TaperedNorm]) -> Iterator[None]:
    """Within the context, all of them divide by their constants alone."""
    stand_ins = list(stand_ins)
    for stand_in in stand_ins:
        stand_in.removed = True
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.removed = False


def use_bounds(stand_ins: Iterable[TaperedNorm]) -> None:
    """Switch all of them to `bounded`, so that no token gets far more than its norm would give; see `TaperedNorm`."""
    for stand_in in stand_ins:
        stand_in.interpolation = "bounded"


class PathReader(nn.Module):
    """A linear layer that reads the two paths of a `TaperedNorm`: query/key first, value second.

    Its last `value_features` outputs read the value path, the others the query/key path.
    """

    def __init__(self, linear: nn.Module, value_features: int) -> None:
        super().__init__()
        self.linear = linear
        self.value_features = value_features

    def forward(self, x: Float[Tensor, "batch position two_paths"]) -> Float[Tensor, "batch position out"]:
        """What the linear layer computes, each output from its own path."""
        weight = linear_weight(self.linear)
        bias = cast(Tensor | None, self.linear.bias)
        split = weight.shape[0] - self.value_features
        query_key, value = x.chunk(2, dim=-1)
        parts = [
            F.linear(query_key, weight[:split], None if bias is None else bias[:split]),
            F.linear(value, weight[split:], None if bias is None else bias[split:]),
        ]
        return torch.cat(parts, dim=-1)
