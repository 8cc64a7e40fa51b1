"""Massive activations: found by the neurons that write them, and scaled down while the norms hide it."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import small_llama
from tests.families import FAMILIES, random_model
from tests.massive import (
    BLOCKS,
    GEMMA3,
    GPT2,
    IDS,
    LLAMA,
    PLANTED,
    SECOND,
    Mlp,
    planted_files,
    read,
    with_massive,
    with_massive_before_a_norm,
    with_two_massive,
)
from tests.running import ctrl_c_at
from unnorm.calibration.equalize import mean_kl, naive_kl
from unnorm.calibration.massive import TOKENS, Neuron, _tokens, shrink_massive
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.models.linear import linear_weight
from unnorm.models.running import copy_model
from unnorm.models.sizes import vocabulary_size
from unnorm.sites.find import find_sites
from unnorm.taper.stand_ins import install
from unnorm.training.losses import RUNAWAY, massive_unevenness, read_mismatch, unevenness
from unnorm.training.token_clip import clip_tokens

BUDGET = 0.5


class Shrunk(NamedTuple):
    """A student after `shrink_massive`, what that returned, and naive KL before and after."""

    student: PreTrainedModel
    neurons: list[Neuron]
    before: float
    after: float


def shrink(original: PreTrainedModel, budget: float = BUDGET, blocks: Dataset = BLOCKS) -> Shrunk:
    student = copy_model(original).eval()
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, blocks), "geometric")
    before = naive_kl(student, original, stand_ins, blocks)
    neurons = shrink_massive(student, original, sites, stand_ins, blocks, "geometric", budget)
    return Shrunk(student, neurons, before, naive_kl(student, original, stand_ins, blocks))


def test_neurons_that_can_not_be_scaled_down_are_said_to_be_left(tiny_model: GPT2LMHeadModel) -> None:
    planted = with_massive(tiny_model, GPT2)
    student, said = copy_model(planted).eval(), list[str]()
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    assert shrink_massive(student, planted, sites, stand_ins, BLOCKS, "geometric", 1e-9, said.append) == []
    assert differing(student, planted) == [] and len(said) == 1 and "a larger --kl-budget" in said[0]


def differing(student: PreTrainedModel, original: PreTrainedModel) -> list[str]:
    """Names of the weights that both models have, not bit for bit alike."""
    ours = student.state_dict()
    return [
        name for name, value in original.state_dict().items() if name in ours and not torch.equal(ours[name], value)
    ]


def small_granite() -> GraniteForCausalLM:
    """The small Llama's weights in a Granite, which multiplies what its sublayers write."""
    llama = small_llama()
    shape = {key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "architectures")}
    granite = GraniteForCausalLM(GraniteConfig(**shape, residual_multiplier=0.22, embedding_multiplier=3.0))
    granite.load_state_dict(llama.state_dict())
    return granite


@pytest.fixture(params=["gpt2", "llama", "granite"])
def planted(request: pytest.FixtureRequest, tiny_model: GPT2LMHeadModel) -> tuple[PreTrainedModel, Mlp]:
    if request.param == "gpt2":
        return with_massive(tiny_model, GPT2), GPT2
    if request.param == "llama":
        return with_massive(small_llama(), LLAMA), LLAMA
    granite = small_granite()
    return with_massive(granite, LLAMA, length=100.0 / granite.config.residual_multiplier), LLAMA


def test_the_neuron_is_found_and_scaled_down_within_the_budget(planted: tuple[PreTrainedModel, Mlp]) -> None:
    original, mlp = planted
    student, neurons, before, after = shrink(original)
    assert [(neuron.writer, neuron.index) for neuron in neurons] == [(mlp.outgoing, PLANTED)]
    assert neurons[0].length > 20
    assert neurons[0].factor < 0.3
    assert mean_kl(student, original, BLOCKS) <= BUDGET
    assert after < before
    scales = [read(model, mlp.next_norm)[:, 0].square().mean(-1).sqrt() for model in (student, original)]
    assert (scales[0] < scales[1] / 3).all()


def test_only_its_column_changes_and_by_its_factor(planted: tuple[PreTrainedModel, Mlp]) -> None:
    original, mlp = planted
    student, (neuron,), *_ = shrink(original)
    assert differing(student, original) == [f"{mlp.outgoing}.weight"]
    ours, theirs = (linear_weight(model.get_submodule(mlp.outgoing)).detach().clone() for model in (student, original))
    torch.testing.assert_close(ours[:, PLANTED], neuron.factor * theirs[:, PLANTED])
    added = read(original, mlp.outgoing)[..., PLANTED, None] * theirs[:, PLANTED]
    times = getattr(original.config, "residual_multiplier", 1.0)
    predicted = read(original, mlp.next_norm) + times * (neuron.factor - 1) * added
    torch.testing.assert_close(read(student, mlp.next_norm), predicted, rtol=1e-3, atol=1e-3)
    ours[:, PLANTED] = theirs[:, PLANTED]
    assert torch.equal(ours, theirs)


def test_a_neuron_before_a_norm_is_found_and_scaled_down_until_the_norm_can_not_undo_it() -> None:
    original = with_massive_before_a_norm()
    student, (neuron,), before, after = shrink(original)
    assert (neuron.writer, neuron.index) == (GEMMA3.outgoing, PLANTED)
    scales = read(original, GEMMA3.next_norm).square().mean(-1).sqrt()
    usual = scales[:, 1:].log().mean().exp()
    assert neuron.length == pytest.approx(float(scales[0, 0] / usual), rel=0.1)  # Nearly all that is there.
    assert neuron.factor < 0.3
    assert differing(student, original) == [f"{GEMMA3.outgoing}.weight"]
    ours = read(student, GEMMA3.next_norm)[:, 0].square().mean(-1).sqrt()
    assert (ours < scales[:, 0] / 3).all()
    assert mean_kl(student, original, BLOCKS) <= BUDGET
    assert after < before


def test_neurons_are_told_longest_first_in_usual_scales_of_the_next_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unnorm.calibration.massive.STEPS", 1)
    original = with_two_massive(2.0)
    neurons = shrink(original, budget=math.inf).neurons
    usual = read(original, LLAMA.next_norm)[:, 1:].square().mean(-1).log().mean().div(2).exp()
    columns = linear_weight(original.get_submodule(LLAMA.outgoing)).T
    vectors = {n: read(original, LLAMA.outgoing)[..., n, None] * columns[n] for n in (SECOND, PLANTED)}
    expected = {n: float((vector.square().mean(-1).sqrt().max() / usual).detach()) for n, vector in vectors.items()}
    assert [neuron.index for neuron in neurons] == list(expected)
    assert {neuron.index: neuron.length for neuron in neurons} == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr("unnorm.calibration.massive.MOST_NEURONS", 1)
    assert [neuron.index for neuron in shrink(original, budget=math.inf).neurons] == [SECOND]


def test_a_neuron_that_takes_half_of_the_vector_out_is_not_made_larger() -> None:
    neurons = shrink(with_two_massive(-0.5), budget=math.inf).neurons
    factors = {neuron.index: neuron.factor for neuron in neurons}
    assert factors[PLANTED] < factors[SECOND] <= 1


def test_where_less_kl_is_allowed_neurons_are_scaled_down_less(
    tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unnorm.calibration.massive.STEPS", 60)
    original = with_massive(tiny_model, GPT2)
    most = shrink(original, budget=math.inf)
    limit = mean_kl(most.student, original, BLOCKS) / 2
    less = shrink(original, budget=limit)
    assert less.neurons and mean_kl(less.student, original, BLOCKS) <= limit
    assert most.neurons[0].factor < less.neurons[0].factor < 1


def test_the_few_longest_of_many_tokens_are_looked_at() -> None:
    vectors = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    longest = [17, 4001, 9002]
    vectors[longest, 0] = -100
    tokens = _tokens(vectors).tolist()
    assert set(longest) < set(tokens) and len(set(tokens)) == TOKENS


def test_a_model_without_any_is_left_alone(tiny_model: GPT2LMHeadModel) -> None:
    student, neurons, before, after = shrink(tiny_model)
    assert not neurons
    assert before == after
    assert not differing(student, tiny_model)


def test_what_the_budget_does_not_allow_is_undone_to_the_last_bit(planted: tuple[PreTrainedModel, Mlp]) -> None:
    original, _ = planted
    student, neurons, before, after = shrink(original, budget=0.0)
    assert not neurons
    assert before == after
    assert not differing(student, original)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_stays_within_the_budget_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the threshold so low that any neuron is massive, where a family's neurons can be told apart at all."""
    monkeypatch.setattr("unnorm.calibration.massive.MASSIVE", 0.02)
    monkeypatch.setattr("unnorm.calibration.massive.MASSIVE_NORMED", 0.02)
    original = random_model(FAMILIES[family][0]).float().eval()
    blocks = Dataset.from_dict({"input_ids": (IDS % vocabulary_size(original)).tolist()})
    student, neurons, *_ = shrink(original, blocks=blocks)
    assert mean_kl(student, original, blocks) <= BUDGET
    assert bool(neurons) == bool(differing(student, original))
    assert neurons or family not in (
        "gpt2",
        "gpt_neox, parallel",
        "opt",
        "falcon",
        "phi",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "olmo",
        "olmo2",
        "granite",
    )


def test_unevenness_counts_what_is_far_from_the_constant_either_way() -> None:
    log_scale = torch.tensor([[2.0, 2.2, 1.8, 3.25, 0.75]], dtype=torch.float64, requires_grad=True)
    uneven = unevenness(log_scale, torch.tensor(2.0))
    assert float(uneven.detach()) == pytest.approx(2 / 5)
    (gradient,) = torch.autograd.grad(uneven, log_scale)
    torch.testing.assert_close(gradient, torch.tensor([[0, 0, 0, 0.4, -0.4]], dtype=torch.float64))


def test_massive_tokens_unevenness_is_theirs_alone() -> None:
    log_scale = torch.tensor([[5.0, 2.0, 2.1], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    massive = torch.tensor([[True, False, False], [True, False, False]])
    uneven = massive_unevenness(log_scale, torch.tensor(2.0), massive)
    assert float(uneven.detach()) == pytest.approx((3**2 + 1**2) / 2)
    (gradient,) = torch.autograd.grad(uneven, log_scale)
    torch.testing.assert_close(gradient, torch.tensor([[3.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64))
    none = torch.zeros_like(massive)
    assert float(massive_unevenness(log_scale, torch.tensor(2.0), none).detach()) == 0


def test_a_run_says_what_it_scaled_down_and_binds_what_is_left(
    tiny_model: GPT2LMHeadModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uneven: list[torch.Tensor] = []
    even_enough: list[float] = []

    def remember(log_scale: torch.Tensor, log_constant: torch.Tensor, *enough: float) -> torch.Tensor:
        even_enough.extend(enough)
        uneven.append(unevenness(log_scale, log_constant, *enough))
        return uneven[-1]

    marked: list[torch.Tensor | None] = []

    def remember_massive(read: torch.Tensor, teacher_read: torch.Tensor, massive: torch.Tensor | None) -> torch.Tensor:
        marked.append(massive)
        return read_mismatch(read, teacher_read, massive)

    of_massive: list[torch.Tensor] = []

    def remember_uneven(log_scale: torch.Tensor, log_constant: torch.Tensor, massive: torch.Tensor) -> torch.Tensor:
        of_massive.append(massive_unevenness(log_scale, log_constant, massive))
        return of_massive[-1]

    shortened: list[bool] = []

    def remember_clipped(gradient: torch.Tensor) -> torch.Tensor:
        clipped = clip_tokens(gradient)
        shortened.append(not torch.equal(clipped, gradient))
        return clipped

    monkeypatch.setattr("unnorm.training.token_clip.clip_tokens", remember_clipped)
    monkeypatch.setattr("unnorm.training.distillation.unevenness", remember)
    monkeypatch.setattr("unnorm.training.distillation.massive_unevenness", remember_uneven)
    monkeypatch.setattr("unnorm.training.distillation.read_mismatch", remember_massive)
    phases: list[Any] = []
    result = unnorm.remove(
        **planted_files(tmp_path, with_massive(tiny_model, GPT2), tiny_tokenizer),
        tokens=2048,
        out=tmp_path / "run",
        device="cpu",
        watch=lambda row: phases.append(row.get("text")),
    )
    assert "scaled down MLP neurons that write massive activations: 1" in phases
    (neuron,) = result["massive_neurons"]
    assert (neuron["writer"], neuron["index"]) == (GPT2.outgoing, PLANTED)
    assert neuron["factor"] < 1 < neuron["length"]
    assert max(float(value.detach()) for value in uneven) > 0
    assert max(float(value.detach()) for value in of_massive) > 0
    # The planted vector sets tokens apart in their gradients too.
    assert any(shortened) and not all(shortened)
    # Once the norms are gone what may run away still counts.
    assert set(even_enough) == {RUNAWAY}
    assert result["norm_modules_left"] == 0
    # Of the sites some read the planted vector, at few tokens, and others none; without norms none are told apart.
    shares = [float(massive.float().mean()) for massive in marked if massive is not None]
    assert min(shares) == 0 < max(shares) < 0.5
    assert marked[-1] is None


@pytest.mark.parametrize(("family", "first"), [("gpt2", 1e-4), ("llama", 1e-4), ("llama", 0.02), ("llama", 100.0)])
def test_a_resumed_run_is_laid_out_as_its_checkpoint_whatever_its_budget_and_tokens(
    family: str, first: float, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What may be scaled down hangs on the budget, and so do bounds, limits and what they are measured on."""
    planted = with_massive(*((tiny_model, GPT2) if family == "gpt2" else (small_llama(), LLAMA)))
    out = tmp_path / "run"
    options: dict[str, Any] = {**planted_files(tmp_path, planted, tiny_tokenizer), "device": "cpu", "context": 32}

    with pytest.raises(unnorm.RunInterruptedError):
        unnorm.remove(tokens=2048, batch_size=8, out=out, kl_budget=first, watch=ctrl_c_at(2), **options)
    layout = json.loads((out / "checkpoints" / "layout.json").read_text())
    neurons = layout["facts"]["massive_neurons"]
    assert bool(neurons) == (first > 1e-3)
    phases: list[Any] = []
    more: dict[str, Any] = {"resume": True, "kl_budget": 1000.0, "tokens": 4096}
    more["watch"] = lambda row: phases.append(row.get("text"))
    if not neurons:  # Too few tokens for a taper that is not bounded.
        with pytest.raises(unnorm.UnnormError, match="Out of tokens after 4,096"):
            unnorm.remove(out=out, **more)
        assert json.loads((out / "checkpoints" / "layout.json").read_text()) == layout
        return
    result = unnorm.remove(out=out, **more)
    assert result["massive_neurons"] == neurons
    assert bool(result["limited_neurons"]) == bool(layout["limited"])
    assert result["norm_modules_left"] == 0 and "calibrating" not in phases


def test_a_model_without_any_is_not_bound(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in ("unevenness", "massive_unevenness"):
        monkeypatch.setattr(f"unnorm.training.distillation.{loss}", lambda *_: pytest.fail("nothing is uneven here"))
    monkeypatch.setattr("unnorm.training.token_clip.clip_tokens", lambda _: pytest.fail("no token stands out"))
    unnorm.remove(model=str(tiny_model_dir), data=str(text_file), tokens=2048, out=tmp_path / "run", device="cpu")


def test_a_neuron_that_fires_below_zero_is_found() -> None:
    original = with_massive(small_llama(), LLAMA)
    mlp: Any = original.model.layers[1].mlp
    with torch.no_grad():
        for weight in (mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight[PLANTED] *= -1
    assert [(neuron.writer, neuron.index) for neuron in shrink(original).neurons] == [(LLAMA.outgoing, PLANTED)]


def test_constants_are_those_of_the_model_that_was_scaled_down() -> None:
    original = with_massive(small_llama(), LLAMA)
    student = copy_model(original)
    sites = find_sites(student)
    stand_ins = install(student, sites)
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    assert shrink_massive(student, original, sites, stand_ins, BLOCKS, "geometric", BUDGET)
    found = [stand_in.log_constant.clone() for stand_in in stand_ins.values()]
    set_constants(stand_ins, collect_log_scales(student, sites, BLOCKS), "geometric")
    torch.testing.assert_close(found, [stand_in.log_constant for stand_in in stand_ins.values()])
