"""The learning rate is lowered for models that one step of it would move too far, and only for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel, PreTrainedModel

import unnorm
from tests.conftest import Saved
from unnorm.calibration.step_size import LENGTH, MOST_KL, PROBE, SEQUENCES, first_step_kl, tolerable_lr
from unnorm.models.running import copy_model
from unnorm.runs.plan import default_lr

RATE = 1e-3


def upset(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose predictions are so sharp that small steps move it far."""
    model = copy_model(model)
    with torch.no_grad():
        model.get_submodule("transformer.ln_f").get_parameter("weight").mul_(300.0)
    return model


def test_the_step_is_adams_first(tiny_model: GPT2LMHeadModel) -> None:
    model = copy_model(tiny_model).double()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = first_step_kl(model, RATE)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(weight.grad is not None for weight in model.parameters())

    shape = (2 * SEQUENCES, min(LENGTH, model.config.n_positions))
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    some, others = ids.chunk(2)
    stepped = copy_model(model).requires_grad_(True)
    stepped(input_ids=some, labels=some).loss.backward()
    # The first step of Adam is the learning rate times the sign, where there is a gradient.
    torch.optim.Adam(stepped.parameters(), lr=RATE, eps=1e-30).step()
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=others).logits, dim=-1) for m in (model, stepped))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_kl_grows_with_the_square_of_a_small_step(tiny_model: GPT2LMHeadModel) -> None:
    assert first_step_kl(tiny_model, 2e-4) == pytest.approx(4 * first_step_kl(tiny_model, 1e-4), rel=0.05)


def test_the_rate_is_lowered_until_a_step_costs_little_enough(tiny_model: GPT2LMHeadModel) -> None:
    model = upset(tiny_model)
    usual = default_lr(model, "taper")
    lr = tolerable_lr(model, usual)
    assert lr < 0.7 * usual
    assert first_step_kl(model, PROBE * lr) == pytest.approx(MOST_KL, rel=0.3)
    assert tolerable_lr(tiny_model, default_lr(tiny_model, "taper")) == default_lr(tiny_model, "taper")


def test_a_model_that_is_not_a_number_keeps_its_rate(tiny_model: GPT2LMHeadModel) -> None:
    model = copy_model(tiny_model)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("inf"))
    assert tolerable_lr(model, RATE) == RATE


@pytest.mark.parametrize(
    ("options", "lowered"), [({}, True), ({"lr": RATE}, False), ({"recipe": "sequential"}, False)], ids=str
)
def test_a_run_takes_the_lower_rate_unless_it_was_given_one(
    options: dict[str, Any],
    lowered: bool,
    tiny_model: GPT2LMHeadModel,
    saved: Saved,
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = upset(tiny_model)
    saved(model)
    said: list[str] = []
    settings: dict[str, Any] = {"data": text_file, "tokens": 2048, "context": 32, "device": "cpu", "dtype": "float32"}
    result = unnorm.remove(
        tmp_path / "model",
        **(settings | options),
        kl_budget=1e6,
        out=tmp_path / "run",
        watch=lambda row: said.append(row.get("text", "")),
    )
    usual = options.get("lr") or default_lr(model, options.get("recipe", "taper"))
    assert any("would move this model too far" in text for text in said) == lowered
    lr = tolerable_lr(model, usual) if lowered else usual
    assert result["plan"]["lr"] == pytest.approx(lr, rel=1e-3)
    assert (lr < usual) == lowered
    assert f"lr: {result['plan']['lr']}" in (tmp_path / "run" / "config.yaml").read_text()
