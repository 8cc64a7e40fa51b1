"""Contributions to the residual stream are summed in every layout, or the model is said to be no plain sum."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import unnorm
from tests.conftest import Saved
from tests.families import FAMILIES, GROUPED, IDS, Make, random_model, removed_twin
from unnorm.errors import UnnormError
from unnorm.proof.verify import check_twin
from unnorm.sites.find import find_sites

SUMS: dict[str, tuple[Make, bool]] = {
    "positions without batch": (
        lambda: hf.BlenderbotConfig(
            vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, **IDS
        ),
        True,
    ),
    "heads of two sizes": (
        lambda: hf.Gemma4TextConfig(
            **GROUPED, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=300
        ),
        True,
    ),
    "several streams at once": (
        lambda: hf.ProphetNetConfig(
            vocab_size=64,
            hidden_size=32,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=48,
            **IDS,
        ),
        False,
    ),
}


@pytest.mark.parametrize("layout", SUMS)
def test_contributions_are_summed_in_any_layout_or_said_to_be_no_sum(
    layout: str, saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    make, is_sum = SUMS[layout]
    saved_family(make)
    options: dict[str, Any] = {"context": 32, "tokens": 0, "device": "cpu", "in_place": True}
    unnorm.remove(model=str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", **options)
    checks = {check.name: check for check in unnorm.verify(tmp_path / "run")}
    check = checks.pop("contributions add up to the logits")
    assert all(other.passed for other in checks.values())
    assert (check.passed, "not a plain sum" in check.detail) == (is_sum, not is_sum)


@pytest.mark.parametrize("family", ["opt, post-norm", "opt, projected", "opt, post-norm, projected"])
def test_contributions_go_through_the_linear_maps_that_follow_them(family: str, runs: dict[str, Path]) -> None:
    (check,) = [check for check in unnorm.verify(runs[family]) if check.name.startswith("contributions")]
    # Two embeddings, four heads, an MLP and biases of each layer, at least.
    assert check.passed and int(check.detail.split()[1]) >= 2 + 2 * (4 + 1 + 2), check


def test_contributions_add_up_to_what_a_kept_final_norm_reads(
    runs: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": text_file, "tokens": 0, "context": 32, "device": "cpu"}
    unnorm.remove(runs["llama"].parent / "model", out=tmp_path / "run", keep=r"^model\.norm$", **options)
    (check,) = [check for check in unnorm.verify(tmp_path / "run") if check.name.startswith("contributions")]
    assert check.name == "contributions add up to what model.norm reads" and check.passed
    assert check.detail.endswith(" contributions") and int(check.detail.split()[1]) >= 1 + 2 * (4 + 1)


def test_a_lone_module_that_writes_all_is_no_sum(saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    """A BLOOM whose layers add in what they were given out of sight: every check but the one on sums says yes."""
    sizes: dict[str, Any] = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "slow_but_exact": True, "pretraining_tp": 2}
    saved_family(lambda: hf.BloomConfig(vocab_size=64, **sizes, **IDS))
    unnorm.remove(str(tmp_path / "model"), data=text_file, tokens=0, context=32, out=tmp_path / "run", device="cpu")
    (failed,) = [check for check in unnorm.verify(tmp_path / "run") if not check.passed]
    assert failed.detail == "what 'lm_head' reads is not a plain sum"
    with pytest.raises(UnnormError, match="not a plain sum read by a final norm"):
        unnorm.analyze(tmp_path / "run", what=["attribution"], tokens=64, device="cpu")


def test_a_reader_of_zeros_is_affine() -> None:
    """A head that was ablated."""
    model = random_model(FAMILIES["llama"][0])
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.v_proj").weight.zero_()  # type: ignore[operator, union-attr]
    twin, _, _ = removed_twin(model, sites := find_sites(model))
    assert all(check.passed for check in check_twin(twin, model, sites))
