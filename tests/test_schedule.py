"""Recipes as pure functions of the share of the run that is done."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.families import FAMILIES, random_model
from unnorm.sites.find import find_sites
from unnorm.sites.site import NormSite, Role
from unnorm.taper.schedule import TAPER_SHARE, FidelityController, PathRemoval, sequential, taper, tapernorm


def sites_of(layers: int) -> list[NormSite]:
    names: list[tuple[str, Role]] = [(f"{n}.{role}", role) for n in range(layers) for role in ("attention", "mlp")]
    return [NormSite(name, "layernorm", 1e-5, 8, role, ("reader",), ()) for name, role in [*names, ("final", "final")]]


SITES = sites_of(12)


@given(st.floats(0, 1), st.floats(0, 1))
def test_taper_rises_from_norm_to_constant_for_all_sites_together(early: float, late: float) -> None:
    schedule = taper(SITES)
    early, late = sorted((early, late))
    before, after = schedule.alphas(early), schedule.alphas(late)
    assert before.keys() == {site.name for site in SITES}
    assert all(before[name] <= after[name] for name in before)
    assert len({tuple(alphas) for alphas in before.values()}) == 1
    assert set(schedule.alphas(0.0)["final"]) == {0.0}
    assert set(schedule.alphas(schedule.end)["final"]) == {1.0}
    assert schedule.end < 1


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("gpt2", [{"ln_1", "ln_2", "ln_f"}]),
        ("qwen3", [{"input_layernorm", "post_attention_layernorm", "norm"}, {"q_norm", "k_norm"}]),
        (
            "gemma3",
            [
                {"input_layernorm", "pre_feedforward_layernorm", "norm"},
                {"post_attention_layernorm", "post_feedforward_layernorm"},
                {"q_norm", "k_norm"},
            ],
        ),
        ("olmo2", [{"norm"}, {"post_attention_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"}]),
    ],
)
def test_norms_that_read_the_stream_go_first(family: str, groups: list[set[str]]) -> None:
    schedule = taper(find_sites(random_model(FAMILIES[family][0])))
    order: dict[tuple[float, float], set[str]] = {}
    for removal in sorted(schedule.removals, key=lambda r: r.start):
        order.setdefault((removal.start, removal.end), set()).add(removal.site.rpartition(".")[2])
    assert list(order.values()) == groups
    times = list(order)
    assert schedule.starts == tuple(start for start, _ in times) and schedule.end == times[-1][1]
    assert schedule.starts == pytest.approx([0.0, *(end for _, end in times[:-1])])
    assert all(end - start == pytest.approx(TAPER_SHARE) for start, end in times)


@pytest.mark.parametrize("layers", [2, 12, 48])
def test_sequential_goes_in_the_papers_order_at_the_papers_times(layers: int) -> None:
    sites = sites_of(layers)
    schedule = sequential(sites, [site.name for site in sites if site.role == "attention"])
    roles: dict[str, Role] = {site.name: site.role for site in sites}
    order = [(roles[r.site], r.path) for r in sorted(schedule.removals, key=lambda r: r.end)]
    of_layers = [("mlp", 0)] * layers + [("attention", 0)] * layers + [("attention", 1)] * layers
    assert order == [*of_layers, ("final", 0)]
    # The paper's steps for 12 layers and 300 steps: 20, then 12 * 2, 12 * 2 and 12 * 3 later, 2, 10.
    ends = (schedule.removals[0].start, schedule.end, schedule.special_position_0)
    steps = [round(300 * t) for t in ends]
    assert steps == [20, 104, 116]
    assert round(300 * schedule.special_end_of_text) == 106
    assert all(removal.start == removal.end for removal in schedule.removals)


def test_near_the_end_kl_is_no_reason_to_wait() -> None:
    for share, moves in ((0.92, False), (0.94, True)):
        controller = FidelityController(kl_budget=0.1, end=0.4, position=share * 0.4, running_kl=0.2)
        controller.advance(0.2, refused=False, steps=1000)
        assert (controller.position > share * 0.4) is moves is controller.arrived


def in_two_stages(position: float, running_kl: float, speed: float = 1.0) -> FidelityController:
    return FidelityController(0.1, 0.4, (0.0, 0.3), position=position, running_kl=running_kl, speed=speed)


@pytest.mark.parametrize(
    ("position", "lands", "arrived"),
    [(0.27, False, False), (0.29, True, False), (0.3, False, False), (0.392, False, False), (0.394, True, True)],
)
def test_near_the_end_of_each_stage_kl_is_no_reason_to_wait(position: float, lands: bool, arrived: bool) -> None:
    controller = in_two_stages(position, 0.2)
    assert (controller.lands, controller.arrived) == (lands, arrived)
    controller.advance(0.2, refused=False, steps=1000)
    assert (controller.position > position) is lands


@pytest.mark.parametrize(("position", "length"), [(0.2, 0.3), (0.301, 0.1), (0.35, 0.1), (0.4, 0.1)])
def test_going_back_costs_a_share_of_the_stage(position: float, length: float) -> None:
    controller = in_two_stages(position, 0.05, 0.5)
    for _ in range(controller.BAD_AFTER_END if position == controller.end else 1):
        controller.advance(math.nan, refused=True, steps=1000)
    assert controller.position == pytest.approx(position - controller.BACK * length)
    assert controller.speed == 0.25


def test_a_new_stage_begins_at_full_speed() -> None:
    controller = in_two_stages(0.2995, 0.04, 0.25)
    speeds = []
    for _ in range(4):
        controller.advance(0.04, refused=False, steps=1000)
        speeds.append(controller.speed)
    assert speeds == pytest.approx([0.25 * controller.FASTER, 1, 1, 1])


def test_sequential_keeps_unsplit_attention_in_one_piece() -> None:
    schedule = sequential(SITES, [])
    assert len(schedule.removals) == len(SITES)
    assert {removal.path for removal in schedule.removals} == {0}
    starts = {removal.site: round(300 * removal.start) for removal in schedule.removals}
    assert [starts[name] for name in ("0.mlp", "0.attention", "11.attention", "final")] == [20, 44, 77, 80]


def test_a_switch_is_abrupt() -> None:
    removal = PathRemoval("site", 0, 0.5, 0.5)
    assert [removal.alpha(p) for p in (0.0, 0.499, 0.5, 1.0)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_taper_is_a_half_cosine(share: float) -> None:
    expected = math.sin(math.pi / 2 * share) ** 2
    assert PathRemoval("site", 0, 0.2, 0.6).alpha(0.2 + 0.4 * share) == pytest.approx(expected)


def test_tapernorm_holds_its_gate_and_then_lowers_it() -> None:
    schedule = tapernorm(SITES)
    for progress, expected in ((0.05, 0.0), (0.1, 0.0), (0.35, 0.5), (0.6, 1.0)):
        assert schedule.alphas(progress) == {site.name: [pytest.approx(expected)] for site in SITES}


def test_the_controller_is_a_plain_clock_as_long_as_all_is_well() -> None:
    controller = FidelityController(kl_budget=0.5, end=0.4)
    positions = []
    for step in range(100):
        positions.append(controller.position)
        assert controller.late(step, 100) == 0
        controller.advance(0.05, refused=False, steps=100)
    assert all(math.isclose(position, step / 100, abs_tol=1e-12) for step, position in enumerate(positions))
    assert controller.arrived
    assert (controller.waited, controller.set_back) == (0, 0)


def test_the_controller_slows_down_from_half_the_budget_on() -> None:
    steps = []
    for kl in (0.24, 0.375, 0.49):
        controller = FidelityController(kl_budget=0.5)
        controller.advance(kl, refused=False, steps=100)
        steps.append(controller.position)
    assert steps == pytest.approx([0.01, 0.005, 0.0004])


def test_where_massive_activations_were_scaled_down_it_starts_well_under_the_budget() -> None:
    controller = FidelityController(kl_budget=0.4)
    for _ in range(10):
        controller.advance(0.25, refused=False, steps=100, held=0.5)
    assert (controller.position, controller.waited) == (0, 10)
    controller.advance(math.nan, refused=True, steps=100, held=0.5)
    controller.advance(0.25, refused=False, steps=100, held=0.5)
    assert (controller.position, controller.waited) == (0, 11)  # A refused step is no beginning.
    while not controller.position:
        controller.advance(0.05, refused=False, steps=100, held=0.5)
    for _ in range(10):
        controller.advance(0.25, refused=False, steps=100, held=0.5)
    assert controller.position > 0.05


def test_the_controller_waits_over_budget_and_goes_on_under_it() -> None:
    controller = FidelityController(kl_budget=0.1)
    for _ in range(10):
        controller.advance(0.09, refused=False, steps=100)
    at = controller.position
    while controller.running_kl is not None and controller.running_kl <= 0.1:
        at = controller.position
        controller.advance(0.15, refused=False, steps=100)
    for _ in range(50):
        controller.advance(0.15, refused=False, steps=100)
    assert controller.position == at
    assert controller.waited > 50
    assert controller.late(100, 100) == round(100 * (1 - at))
    for _ in range(50):
        controller.advance(0.05, refused=False, steps=100)
    assert controller.position > at


def test_the_controller_goes_back_and_on_more_slowly() -> None:
    for fault in ({"kl": 2.0, "refused": False}, {"kl": 0.05, "refused": True}, {"kl": math.nan, "refused": False}):
        controller = FidelityController(kl_budget=0.5)
        for _ in range(30):
            controller.advance(0.05, refused=False, steps=100)
        before = controller.position
        controller.advance(**fault, steps=100)  # type: ignore[arg-type]
        after = controller.position
        assert math.isclose(before - after, controller.BACK)
        assert controller.running_kl is not None and math.isclose(controller.running_kl, 0.05)
        controller.advance(0.05, refused=False, steps=100)
        assert math.isclose(controller.position - after, controller.SLOWER / 100)


def test_after_going_back_the_controller_gets_faster_again() -> None:
    controller = FidelityController(kl_budget=0.5, position=0.5, running_kl=0.05)
    controller.advance(math.nan, refused=True, steps=1000)
    for good in range(1, 31):
        controller.advance(0.05, refused=False, steps=1000)
        assert controller.speed == pytest.approx(min(1.0, controller.SLOWER * controller.FASTER**good))
    assert controller.speed == 1


def test_where_bounds_hold_next_to_nothing_kl_is_no_reason_to_wait() -> None:
    controller = FidelityController(kl_budget=0.1, end=0.4)
    for _ in range(60):
        controller.advance(0.2, refused=False, steps=100, held=0.01)
    assert controller.position == 0 and not controller.arrived
    positions = []
    while not positions or positions[-1] < controller.end:
        controller.advance(0.2, refused=False, steps=100, held=0.0)
        positions.append(controller.position)
    assert not any(positions[:20]), "a few steps say nothing"
    moving = [position for position in positions if position]
    assert moving == pytest.approx([0.01 * (step + 1) for step in range(len(moving))])
    unbounded = FidelityController(kl_budget=0.1, end=0.4)
    for _ in range(60):
        unbounded.advance(0.2, refused=False, steps=100)
    assert unbounded.position == 0


def test_with_everything_removed_one_bad_batch_changes_nothing() -> None:
    controller = FidelityController(end=0.4, position=0.9, running_kl=0.05)
    for _ in range(controller.BAD_AFTER_END - 1):
        controller.advance(math.nan, refused=True, steps=100)
    assert (controller.position, controller.set_back) == (0.9, 0)
    controller.advance(0.05, refused=False, steps=100)
    for _ in range(controller.BAD_AFTER_END):
        controller.advance(math.nan, refused=True, steps=100)
    assert controller.position < controller.end


def test_going_back_long_after_arrival_makes_the_clock_a_little_late() -> None:
    controller = FidelityController(end=0.1)
    for _ in range(900):
        controller.advance(0.1, refused=False, steps=1000)
    for _ in range(3):
        controller.advance(math.nan, refused=True, steps=1000)
    assert (controller.set_back, controller.position) == (1, pytest.approx(0.097))
    assert controller.late(903, 1000) == 6  # Three that were refused, and 3% of the taper.


def test_with_everything_removed_the_clock_runs_at_full_speed() -> None:
    controller = FidelityController(end=0.1, position=0.11, running_kl=0.05, speed=1 / 8)
    for _ in range(100):
        controller.advance(0.05, refused=False, steps=1000)
    assert controller.position == pytest.approx(0.21)


def test_the_controller_knows_when_healing_has_ended() -> None:
    controller = FidelityController(position=1.0)
    for step in range(100):
        controller.advance(0.5 * 0.97**step, refused=False, steps=1000)
    assert controller.stale < 10
    for _ in range(200):
        controller.advance(0.5 * 0.97**100, refused=False, steps=1000)
    assert controller.stale > 100


@given(st.lists(st.tuples(st.floats(0, 100) | st.just(math.nan), st.booleans()), max_size=60), st.floats(0.01, 1))
def test_whatever_happens_the_controller_stays_within_bounds(steps: list[tuple[float, bool]], end: float) -> None:
    controller = FidelityController(end=end)
    for kl, refused in steps:
        controller.advance(kl, refused, steps=20)
        assert 0 <= controller.position <= 1
        assert controller.SLOWEST <= controller.speed <= 1
        assert controller.running_kl is None or math.isfinite(controller.running_kl)


def test_sequential_removes_sites_of_every_role() -> None:
    sites = [NormSite(role, "layernorm", 1e-5, 8, role, ("reader",), ()) for role in get_args(Role)]
    assert {removal.site for removal in sequential(sites, []).removals} == set(get_args(Role))


def test_going_back_starts_the_wait_for_gains_anew() -> None:
    controller = FidelityController(end=0.4, position=0.9, running_kl=0.05, best_kl=0.05, stale=90)
    for _ in range(controller.BAD_AFTER_END):
        controller.advance(math.nan, refused=True, steps=100)
    assert (controller.set_back, controller.best_kl, controller.stale) == (1, math.inf, 0)
