"""Recipes as pure functions of the share of the run that is done."""

from hypothesis import given
from hypothesis import strategies as st

from unnorm.schedule import PathRemoval, sequential, taper
from unnorm.sites import NormSite, Role

SITES = [
    NormSite(f"{layer}.{role}", "layernorm", 1e-5, 8, role, ("reader",), ())
    for layer in range(12)
    for role in ("attention", "mlp")
] + [NormSite("final", "layernorm", 1e-5, 8, "final", ("reader",), ())]
ATTENTION = [site.name for site in SITES if site.role == "attention"]


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


def test_sequential_goes_in_the_papers_order_at_the_papers_times() -> None:
    schedule = sequential(SITES, ATTENTION)
    roles: dict[str, Role] = {site.name: site.role for site in SITES}
    order = [(roles[r.site], r.path) for r in sorted(schedule.removals, key=lambda r: r.end)]
    assert order == [("mlp", 0)] * 12 + [("attention", 0)] * 12 + [("attention", 1)] * 12 + [("final", 0)]
    # The paper's steps for 12 layers and 300 steps: 20, then 12 * 2, 12 * 2 and 12 * 3 later, 2, 10.
    steps = [round(300 * t) for t in (schedule.removals[0].start, schedule.removals[-1].end, schedule.end)]
    assert steps == [20, 104, 116]
    assert round(300 * schedule.special_end_of_text) == 106
    assert all(removal.start == removal.end for removal in schedule.removals)


def test_sequential_keeps_unsplit_attention_in_one_piece() -> None:
    schedule = sequential(SITES, [])
    assert len(schedule.removals) == len(SITES)
    assert {removal.path for removal in schedule.removals} == {0}


def test_a_switch_is_abrupt() -> None:
    removal = PathRemoval("site", 0, 0.5, 0.5)
    assert [removal.alpha(p) for p in (0.0, 0.499, 0.5, 1.0)] == [0.0, 0.0, 1.0, 1.0]
