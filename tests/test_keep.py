"""`--keep`: norms that stay are counted, named in card and report, and proved beside the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import unnorm
from tests.conftest import Saved
from tests.families import DEEPSEEK, FAMILIES, GROUPED, random_model, removed_twin
from unnorm.errors import UnnormError
from unnorm.proof.at_load import prove_sites
from unnorm.proof.verify import check_twin
from unnorm.sites.find import find_sites, norm_modules


def test_kept_norms_stay_and_are_counted(saved_family: Saved, text_file: Path, tmp_path: Path) -> None:
    saved_family(FAMILIES["qwen3"][0])
    options: dict[str, Any] = {"context": 32, "batch_size": 8, "tokens": 100 * 256, "device": "cpu", "kl_budget": 100}
    result = unnorm.remove(
        model=str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", keep="[qk]_norm", **options
    )
    assert (result["sites"], result["norm_modules_left"], result["verified"]) == (5, 4, True)
    assert all(name.endswith(("q_norm", "k_norm")) for name in norm_modules(unnorm.load(tmp_path / "run")))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "in which 5 of 9 norms became fixed affine maps" in card and "one of the 4 kept norms" in card
    assert "no normalization layers" not in card and "every layer" not in card
    assert "of 9 norm sites" in (tmp_path / "run" / "report.html").read_text()


def test_norms_that_are_no_modules_are_named_where_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: torch.nn.functional.rms_norm(forward(self, x), [32]))
    model = random_model(FAMILIES["gpt2"][0])
    sites = find_sites(model, keep="ln_f")
    twin, _, _ = removed_twin(model, sites)
    row = check_twin(twin, model, sites)[0]
    assert "kept: transformer.ln_f; left too" in row.detail and "transformer.h.0.mlp" in row.detail


def test_gated_norms_may_be_kept() -> None:
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
    model = random_model(lambda: hf.BambaConfig(**GROUPED, **sizes, attn_layer_indices=[1]))
    with pytest.raises(UnnormError, match=r"takes a second tensor.*--keep 'model") as refusal:
        find_sites(model)
    keep = str(refusal.value).partition("--keep '")[2].partition("'")[0]
    sites = find_sites(model, keep=keep)
    assert len(sites) == 5
    assert prove_sites(model, sites) < 1e-10


@pytest.mark.parametrize("keep", [None, "indexer"])
def test_norms_where_no_gradient_flows_are_refused_kept_or_not(keep: str | None) -> None:
    """The sparse attention's indexer reads other norms as well, where tracing does not come to."""
    config = hf.DeepseekV32Config(**DEEPSEEK, index_n_heads=2, index_head_dim=16, index_topk=8)
    with pytest.raises(UnnormError, match=r"indexer.*called where no gradient flows"):
        find_sites(random_model(lambda: config), keep=keep)


@pytest.mark.parametrize(
    ("keep", "message"), [("[", "not a regular"), ("nowhere", "none of the norms"), (".", "every")]
)
def test_keep_that_can_not_be_followed(keep: str, message: str) -> None:
    with pytest.raises(UnnormError, match=message):
        find_sites(random_model(FAMILIES["llama"][0]), keep=keep)


def test_a_run_whose_norms_all_fold_into_writers_is_proved(
    saved_family: Saved, text_file: Path, tmp_path: Path
) -> None:
    saved_family(FAMILIES["qwen3"][0])
    options: dict[str, Any] = {"context": 32, "tokens": 0, "device": "cpu", "keep": r"layernorm$|model\.norm$"}
    result = unnorm.remove(str(tmp_path / "model"), data=str(text_file), out=tmp_path / "run", **options)
    assert result["verified"]
