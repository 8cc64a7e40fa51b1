"""Norms that follow a projection: the first position is brought to the constant scale while the norms hide it."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedModel

from tests.families import FAMILIES, random_model
from unnorm.calibration.equalize import mean_kl
from unnorm.calibration.first_position import OFF, TRIED, equalize_first_position
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.hooks import recorded
from unnorm.models.running import copy_model
from unnorm.models.sizes import vocabulary_size
from unnorm.sites.find import find_sites
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm
from unnorm.taper.stand_ins import install

SHORT = 0.1
KEYS = "model.layers.1.self_attn.k_norm"


def blocks_of(model: PreTrainedModel, begin: int | None = 1) -> Dataset:
    ids = torch.randint(2, vocabulary_size(model), (16, 24), generator=torch.Generator().manual_seed(3))
    if begin is not None:
        ids[:, 0] = begin
    return Dataset.from_dict({"input_ids": ids.tolist()})


def with_short_keys(family: str = "qwen3", vocabulary: int = 64) -> PreTrainedModel:
    """Keys at the first position are a tenth as long before their norm in layer 1, which undoes it."""
    config = FAMILIES[family][0]()
    config.vocab_size, config.hidden_size = vocabulary, 256
    model = random_model(lambda: config).float().eval()
    projection = model.get_submodule("model.layers.1.self_attn.k_proj")
    with torch.no_grad():
        model.get_submodule(KEYS).weight.mul_(8.0)  # Sharp attention, to which the length of keys matters.
    with torch.no_grad(), recorded(model, ["model.layers.1.self_attn.k_proj"], copies=True) as record:
        model(input_ids=torch.tensor(blocks_of(model)["input_ids"]))
        x, y = record["model.layers.1.self_attn.k_proj"]
        first, rest = x[:, 0].mean(0), x[:, 1:].flatten(0, 1)
        # Perpendicular to nearly all that is read elsewhere.
        direction = torch.linalg.solve(rest.T @ rest / len(rest) + 1e-3 * torch.eye(len(first)), first)
        projection.weight -= (1 - SHORT) * torch.outer(y[:, 0].mean(0), direction / (first @ direction))
    return model


def calibrated(
    model: PreTrainedModel, blocks: Dataset
) -> tuple[PreTrainedModel, list[NormSite], dict[str, TaperedNorm]]:
    sites, student = find_sites(model), copy_model(model)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, blocks), "geometric")
    return student, sites, stand_ins


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_short_keys_get_the_constant_scale_and_the_norms_hide_it() -> None:
    model = with_short_keys()
    blocks = blocks_of(model)
    student, sites, stand_ins = calibrated(model, blocks)

    def off() -> torch.Tensor:
        """Of the first position's keys, by head."""
        with recorded(student, [KEYS]) as record, torch.no_grad():
            student(input_ids=torch.tensor(blocks["input_ids"]))
        return stand_ins[KEYS].departure(record[KEYS][0][:, 0] if record[KEYS][0].shape[1] == 24 else record[KEYS][0])

    def tapered() -> float:
        stand_ins[KEYS].alpha.fill_(TRIED)
        found = mean_kl(student, model, blocks)
        stand_ins[KEYS].alpha.zero_()
        return found

    assert off().max() < -1
    before = tapered()
    assert KEYS in equalize_first_position(student, model, sites, stand_ins, blocks, "geometric")
    assert off().abs().max() < OFF
    assert mean_kl(student, model, blocks) < 0.5 * before
    assert tapered() < 0.75 * before


def test_a_first_position_that_reads_something_else_in_every_block_is_left_alone() -> None:
    model = with_short_keys()
    blocks = blocks_of(model, begin=None)
    student, sites, stand_ins = calibrated(model, blocks)
    before = weights(student)
    assert equalize_first_position(student, model, sites, stand_ins, blocks, "geometric") == []
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_does_not_help_is_undone_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_short_keys()
    blocks = blocks_of(model)
    student, sites, stand_ins = calibrated(model, blocks)
    before = weights(student)
    growing = iter(range(100))
    monkeypatch.setattr("unnorm.calibration.first_position.mean_kl", lambda *_: next(growing))
    assert equalize_first_position(student, model, sites, stand_ins, blocks, "geometric") == []
    assert next(growing) >= 2  # Tried, then.
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_models_whose_norms_follow_no_projection_are_not_even_run(
    tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(tiny_model)
    student, sites, stand_ins = calibrated(tiny_model, blocks)
    monkeypatch.setattr(type(student), "forward", None)
    assert equalize_first_position(student, tiny_model, sites, stand_ins, blocks, "geometric") == []


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name.partition(",")[0] in ("gemma2", "gemma3", "olmo2")]
)
def test_what_is_kept_helps_in_every_family_with_such_norms(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the threshold so low that every head is edited."""
    monkeypatch.setattr("unnorm.calibration.first_position.OFF", 1e-6)
    model = random_model(FAMILIES[family][0]).float().eval()
    blocks = blocks_of(model)
    student, sites, stand_ins = calibrated(model, blocks)
    edited = equalize_first_position(student, model, sites, stand_ins, blocks, "geometric")
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, weights(model).get(name, value))
    }
    assert changed == {f"{site.writers[0]}.weight" for site in sites if site.name in edited}
