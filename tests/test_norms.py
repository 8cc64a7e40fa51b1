"""Stand-ins: the norm at one end, an affine map at the other, and what lies between."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unnorm.calibration.scales import scale_statistics, set_constants
from unnorm.taper.norms import (
    CEILING,
    Estimator,
    Interpolation,
    PathReader,
    TaperedNorm,
    TokenMask,
    estimate_log_constant,
)


def make(centered: bool = True, paths: int = 1, width: int = 12, mask: TokenMask | None = None) -> TaperedNorm:
    torch.manual_seed(0)
    gain, bias = torch.randn(width).double(), torch.randn(width).double()
    return TaperedNorm(gain, bias if centered else None, 1e-5, centered, paths, mask)


def residual(width: int = 12) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, width).double() * torch.tensor([0.1, 1, 3, 10, 100]).double()[:, None] + 2


@pytest.mark.parametrize("centered", [True, False])
def test_alpha_zero_is_the_norm(centered: bool) -> None:
    stand_in, x = make(centered), residual()
    norm = nn.LayerNorm(12, eps=1e-5) if centered else nn.RMSNorm(12, eps=1e-5)
    norm.double().weight.data = stand_in.gain.data
    if centered:
        norm.bias.data = stand_in.bias.data
    torch.testing.assert_close(stand_in(x), norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("removed", [True, False])
def test_alpha_one_is_affine(centered: bool, removed: bool) -> None:
    stand_in, x, y = make(centered), residual(), residual().flip(1)
    stand_in.alpha.fill_(1)
    stand_in.log_constant.fill_(0.7)
    stand_in.removed = removed
    mixed = stand_in(2 * x - 3 * y)
    torch.testing.assert_close(mixed, 2 * stand_in(x) - 3 * stand_in(y) + 2 * stand_in(0 * x), rtol=1e-10, atol=1e-10)


def test_removed_path_equals_alpha_one() -> None:
    stand_in, x = make(), residual()
    stand_in.alpha.fill_(1)
    stand_in.log_constant.fill_(-0.4)
    slow = stand_in(x)
    stand_in.removed = True
    torch.testing.assert_close(stand_in(x), slow, rtol=1e-12, atol=1e-12)


@given(alpha=st.floats(0, 1), log_constant=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_interpolates_in_log_scale(alpha: float, log_constant: float) -> None:
    stand_in, x = make(), residual()
    stand_in.log_constant.fill_(log_constant)
    norm = stand_in(x) - stand_in.bias
    stand_in.alpha.fill_(alpha)
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = norm * (scale / torch.tensor(log_constant).double().exp()) ** alpha
    torch.testing.assert_close(stand_in(x) - stand_in.bias, expected, rtol=1e-6, atol=1e-6)


def test_alpha_moves_without_a_python_branch() -> None:
    stand_in, x = make(), residual()
    compiled = torch.compile(stand_in, backend="eager", fullgraph=True)
    for alpha in (0.0, 0.3, 0.9):
        stand_in.alpha.fill_(alpha)
        torch.testing.assert_close(compiled(x), stand_in(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("geometric", 2.0), ("mean", 7 / 3), ("least-squares", (1 + 4 + 16) / (1 + 2 + 4))],
)
def test_estimators(estimator: Estimator, expected: float) -> None:
    log_scale = torch.tensor([1.0, 2.0, 4.0]).double().log()
    constant = estimate_log_constant(log_scale, torch.ones(3).double(), estimator).exp()
    assert float(constant) == pytest.approx(expected)


@pytest.mark.parametrize("at_0", [60.0, 0.3])
def test_statistics_keep_the_first_position_apart(at_0: float) -> None:
    (row,) = scale_statistics({"norm": torch.tensor([[at_0 / 2, 1, 2, 4], [at_0 * 1.5, 1, 2, 4]]).log()})
    assert (row.position_0, row.mean, row.geometric_mean) == pytest.approx((at_0, 7 / 3, 2))
    assert (row.smallest, row.largest) == pytest.approx((1, 4))
    assert row.spread == pytest.approx(float(torch.tensor([1.0, 2, 4] * 2).log().std()))


def test_least_squares_minimizes_the_readers_input_error() -> None:
    log_scale = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    best = estimate_log_constant(log_scale, torch.ones(500).double(), "least-squares")

    def error(log_constant: torch.Tensor) -> float:
        return float(((log_scale - log_constant).exp() - 1).square().mean())

    assert error(best) <= min(error(best + 1e-3), error(best - 1e-3))


def test_running_estimate_follows_the_batches_and_stops_at_arrival() -> None:
    stand_in, x = make(), residual()
    stand_in.estimating = True
    for _ in range(200):
        stand_in.train()(x)
    settled = stand_in.constant
    centered = x - x.mean(-1, keepdim=True)
    assert settled == pytest.approx(float((0.5 * (centered.square().mean(-1) + 1e-5).log()).mean().exp()))
    stand_in.eval()(100 * x)
    assert stand_in.constant == settled
    stand_in.alpha.fill_(1)
    stand_in.train()(100 * x)
    assert stand_in.constant == settled


def test_special_tokens_have_their_own_constant() -> None:
    mask = TokenMask()
    stand_in, x = make(mask=mask), residual()
    stand_in.alpha.fill_(1)
    stand_in.log_constant.copy_(torch.tensor([0.0, 2.0]))
    plain = stand_in(x)
    mask.mask = torch.zeros(2, 5, dtype=torch.bool)
    mask.mask[:, 0] = True
    special = stand_in(x)
    torch.testing.assert_close(special[:, 1:], plain[:, 1:])
    expected = (plain[:, 0] - stand_in.bias) / torch.tensor(2.0).double().exp() + stand_in.bias
    torch.testing.assert_close(special[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_running_estimates_of_ordinary_and_special_tokens_keep_apart() -> None:
    token_mask = TokenMask()
    stand_in, x = make(mask=token_mask), residual()
    token_mask.mask = mask = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    old = torch.tensor([0.3, -0.2]).double()
    stand_in.log_constant.copy_(old)
    stand_in.estimating = True
    stand_in(x)
    log_scale = 0.5 * ((x - x.mean(-1, keepdim=True)).square().mean(-1) + 1e-5).log()
    new = torch.stack([log_scale[~mask].mean(), log_scale[mask].mean()])
    kept = stand_in.momentum
    torch.testing.assert_close(stand_in.log_constant, kept * old + (1 - kept) * new)


def test_constants_stay_as_they_are_once_either_path_has_arrived() -> None:
    for alphas, moves in (([0.5, 0.0], True), ([1.0, 0.0], False), ([0.0, 1.0], False)):
        stand_in = make(paths=2)
        stand_in.alpha.copy_(torch.tensor(alphas))
        stand_in.estimating = True
        stand_in(residual())
        assert bool(stand_in.log_constant.any()) is moves


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_first_constants_are_of_position_0_and_of_the_others_and_the_running_ones_alike(estimator: Estimator) -> None:
    def scale_of(x: torch.Tensor) -> torch.Tensor:
        return ((x - x.mean(-1, keepdim=True)).square().mean(-1) + 1e-5).sqrt()

    def constant(scale: torch.Tensor) -> float:
        mean = {"geometric": scale.log().mean().exp(), "mean": scale.mean()}
        return float(mean.get(estimator, scale.square().mean() / scale.mean()))

    stand_in, x = make(), residual()
    scale = scale_of(x)
    set_constants({"norm": stand_in}, {"norm": scale.log()}, estimator)
    stand_in.estimator = estimator
    expected = [constant(scale[:, 1:]), constant(scale[:, 0])]
    assert stand_in.log_constant.exp().tolist() == pytest.approx(expected)
    stand_in.momentum, stand_in.estimating = 0.0, True
    stand_in(10 * x)
    assert stand_in.log_constant.exp().tolist() == pytest.approx([constant(scale_of(10 * x))] * 2)


def test_paths_are_read_apart() -> None:
    stand_in, x = make(paths=2), residual()
    linear = nn.Linear(12, 9).double()
    reader = PathReader(linear, value_features=3)
    single = make()
    torch.testing.assert_close(reader(stand_in(x)), linear(single(x)))
    stand_in.alpha.copy_(torch.tensor([0.0, 1.0]))
    both = reader(stand_in(x))
    torch.testing.assert_close(both[..., :6], linear(single(x))[..., :6])
    single.alpha.fill_(1)
    torch.testing.assert_close(both[..., 6:], linear(single(x))[..., 6:])


def at_both_ends_and_between(
    interpolation: Interpolation, gain: torch.Tensor, alpha: float, log_constant: float
) -> list[torch.Tensor]:
    """What a stand-in gives as a norm, as an affine map, and at `alpha`."""
    stand_in = TaperedNorm(gain, None, 1e-5, True, interpolation=interpolation).eval()
    stand_in.log_constant.fill_(log_constant)
    given = []
    for value in (0.0, 1.0, alpha):
        stand_in.alpha.fill_(value)
        given.append(stand_in(residual()))
    return given


@given(alpha=st.floats(0, 1), log_constant=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_linear_interpolation_mixes_the_two_outputs(alpha: float, log_constant: float) -> None:
    torch.manual_seed(0)
    norm, affine, between = at_both_ends_and_between("linear", torch.randn(12).double(), alpha, log_constant)
    torch.testing.assert_close(between, (1 - alpha) * norm + alpha * affine, rtol=1e-6, atol=1e-6)


@given(alpha=st.floats(0, 1), log_constant=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_bounded_is_the_affine_map_as_far_as_it_stays_near_the_norm(alpha: float, log_constant: float) -> None:
    norm, affine, between = at_both_ends_and_between("bounded", torch.ones(12).double(), alpha, log_constant)
    ratio = (affine / norm).mean(-1, keepdim=True)
    expected = norm * ratio.clamp(1 - alpha, 1 / max(1 - alpha, 1e-300))
    torch.testing.assert_close(between, expected, rtol=1e-6, atol=1e-6)


def test_a_bounded_stand_in_holds_a_massive_activation_and_lets_ordinary_tokens_go() -> None:
    stand_in = TaperedNorm(torch.ones(12).double(), None, 1e-5, False, interpolation="bounded")
    x = residual()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    x[:, 0] *= 50
    stand_in.alpha.fill_(0.5)
    stand_in.keep_log_scale = True
    read = stand_in(x).square().mean(-1).sqrt()
    torch.testing.assert_close(read[:, 0], torch.full((2,), 2.0).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(stand_in(x)[:, 1:], x[:, 1:])
    assert stand_in.held is not None
    assert float(stand_in.held) == pytest.approx(1 / 5)


@pytest.mark.parametrize("removed", [True, False])
def test_while_training_no_token_runs_away_and_afterwards_nothing_is_held(removed: bool) -> None:
    stand_in = TaperedNorm(torch.ones(12).double(), None, 0.0, False, interpolation="bounded")
    x = residual()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    x[:, 0] *= 50
    x[:, 1] /= 50
    stand_in.alpha.fill_(1.0)
    stand_in.removed = removed
    held = x.clone()
    held[:, 0] /= 50 / CEILING
    torch.testing.assert_close(stand_in(x), held)
    torch.testing.assert_close(stand_in.eval()(x), x)
    unbounded = TaperedNorm(torch.ones(12).double(), None, 0.0, False)
    unbounded.alpha.fill_(1.0)
    unbounded.removed = removed
    torch.testing.assert_close(unbounded(x), x)


@pytest.mark.parametrize("centered", [True, False])
def test_departure_is_what_a_token_is_longer_or_shorter_than_the_constant(centered: bool) -> None:
    stand_in = TaperedNorm(torch.ones(12).double(), None, 0.0, centered)
    x = residual()
    at = stand_in.departure(x)
    assert at.shape == x.shape[:-1]
    stand_in.log_constant.fill_(1.0)
    torch.testing.assert_close(stand_in.departure(3 * x + 7 * centered), at + math.log(3) - 1)


def test_scale_is_kept_for_a_penalty_with_its_gradient() -> None:
    stand_in, x = make(), residual().requires_grad_()
    stand_in.keep_log_scale = True
    for removed in (False, True):
        stand_in.removed = removed
        stand_in(x)
        assert stand_in.kept_log_scale is not None
        torch.testing.assert_close(stand_in.kept_log_scale, stand_in.log_scale(x - x.mean(-1, keepdim=True))[..., 0])
        (gradient,) = torch.autograd.grad(stand_in.kept_log_scale.sum(), x)
        assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize(("interpolation", "moves"), [("log", True), ("linear", False)])
def test_constants_follow_the_norm_until_it_is_gone_but_tapernorms_until_the_gate_falls(
    interpolation: Interpolation, moves: bool
) -> None:
    gain = torch.ones(12, dtype=torch.float64)
    stand_in = TaperedNorm(gain, None, 1e-5, False, interpolation=interpolation)
    stand_in.estimating = True
    for alpha, expected in ((0.0, True), (0.5, moves), (1.0, False)):
        stand_in.alpha.fill_(alpha)
        before = stand_in.log_constant.clone()
        stand_in(10 * residual())
        assert (not torch.equal(stand_in.log_constant, before)) is expected
