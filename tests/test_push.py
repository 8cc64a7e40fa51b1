"""The model card, and `unnorm push` against a stand-in of the hub's client."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import Cli
from unnorm.errors import UnnormError
from unnorm.exports.push import check_card, push
from unnorm.folding.checkpoint import load, load_sites
from unnorm.report.card import render_card


class Hub:
    """What was asked of the client, and repositories as folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []  # type: ignore[var-annotated]
        self.private: dict[str, bool] = {}
        self.error: Exception | None = None

    def client(self, token: str) -> SimpleNamespace:
        return SimpleNamespace(
            create_repo=lambda repo, **options: self.create(token, repo, **options),
            repo_info=lambda repo, repo_type: SimpleNamespace(private=self.private[repo]),
            upload_folder=self.upload,
        )

    def create(
        self, token: str, repo: str, *, private: bool | None, exist_ok: bool, repo_type: str
    ) -> huggingface_hub.RepoUrl:
        self.calls.append((token, repo, private, exist_ok, repo_type))
        if self.error is not None:
            raise self.error
        full = repo if "/" in repo else f"me/{repo}"
        self.private.setdefault(full, bool(private))  # Of a repository that exists nothing changes.
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def upload(
        self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str, delete_patterns: list[str]
    ) -> None:
        assert repo_type == "model" and commit_message
        for old in (path for pattern in delete_patterns for path in (self.root / repo_id).glob(pattern)):
            old.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in.client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "from-login")
    return stand_in


@pytest.fixture
def run(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UnnormError) as caught:
        push(*arguments, **options)
    return str(caught.value)


def test_uploads_the_model_as_it_is(hub: Hub, run: Path, cli: Cli) -> None:
    result = cli("push", run, "me/twin", "--private", "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert (values["repo"], values["url"]) == ("me/twin", "https://huggingface.co/me/twin")
    assert hub.calls == [("from-login", "me/twin", True, True, "model")]
    there, here = hub.root / "me/twin", run / "model"
    assert set(values["files"]) == {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_unnorm.py"} <= set(values["files"])
    assert all((there / name).read_bytes() == (here / name).read_bytes() for name in values["files"])


def test_a_repository_is_public_only_if_its_owners_default_is(hub: Hub, run: Path) -> None:
    assert not push(run, "me/twin").private
    assert hub.calls[-1][2] is None  # False would override an organization's default.
    hub.private["org/twin"] = True
    assert push(run, "org/twin").private
    assert "public already" in refusal(run, "me/twin", private=True)


def test_weights_of_another_model_are_not_left_beside_it(hub: Hub, run: Path) -> None:
    """Else transformers would take the one whole file, and not the new shards."""
    push(run, "me/twin", token="x")
    load(run).save_pretrained(run / "model", max_shard_size="50KB")
    (run / "model" / "model.safetensors").unlink(missing_ok=True)
    push(run, "me/twin", token="x")
    pushed = {path.name for path in (hub.root / "me" / "twin").iterdir()}
    assert pushed == {path.name for path in (run / "model").iterdir()}
    assert "model.safetensors.index.json" in pushed and "model.safetensors" not in pushed


def test_token_given_and_name_without_owner(hub: Hub, run: Path) -> None:
    assert push(run, "twin", token="given").repo == "me/twin"
    assert hub.calls[0][:2] == ("given", "twin")


def test_without_a_token(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    text = refusal(run, "me/twin")
    assert "no token" in text and "hf auth login" in text and "--token" in text
    assert hub.calls == []


def failed(status: int) -> Exception:
    error = RuntimeError("said the hub")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no route"), "could not be reached"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline mode"), "could not be reached"),
        (failed(401), "rejected the token"),
        (failed(403), "may not write to 'me/twin'"),
        (failed(500), "refused the upload"),
    ],
)
def test_what_the_hub_may_answer(hub: Hub, run: Path, error: Exception, expected: str) -> None:
    hub.error = error
    assert expected in refusal(run, "me/twin")


def test_a_run_without_weights_is_not_published(hub: Hub, run: Path) -> None:
    """It would put away those that are on the hub."""
    (run / "model/model.safetensors").unlink()
    assert "lacks the weights" in refusal(run, "me/twin")
    assert hub.calls == []


def test_what_is_quick_to_check_is_checked_before_the_proof(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[Path] = []
    monkeypatch.setattr("unnorm.exports.push.verify", lambda directory: proved.append(directory) or [])
    assert "is not a valid repository name" in refusal(run, "a/b/c")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no token" in refusal(run, "me/twin")
    assert proved == [] and push(run, "me/twin", token="given") and proved == [run]


def test_only_finished_and_proved_runs(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert "is not a valid repository name" in refusal(run, "a/b/c")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"verified": False}))
    assert "does not pass" in refusal(run, "me/twin")
    (run / "result.json").unlink()
    assert "unnorm remove --resume --out" in refusal(run, "me/twin")
    assert "holds no finished run" in refusal(tmp_path, "me/twin")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text.partition("---\n")[2], "has no front matter"),
        (lambda text: text.replace("tags:", "tags: [oops"), "is not YAML"),
        (lambda text: text.replace("pipeline_tag", "pipe"), "lacks pipeline_tag"),
        (lambda text: text[: text.index("\n# ")], "nothing after it"),
    ],
)
def test_card_is_checked(hub: Hub, run: Path, edit: Callable[[str], str], expected: str) -> None:
    card = run / "model/README.md"
    card.write_text(edit(card.read_text()))
    assert expected in refusal(run, "me/twin")
    (run / "model/README.md").unlink()
    assert "lacks README.md" in refusal(run, "me/twin")
    assert hub.calls == []


class TestCard:
    @pytest.fixture
    def result(self, finished_run: Path) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((finished_run / "result.json").read_text())
        return values

    def test_of_a_run(self, finished_run: Path, result: dict[str, Any], tmp_path: Path) -> None:
        path = finished_run / "model/README.md"
        check_card(path)
        text = path.read_text()
        data = huggingface_hub.ModelCard(text).data
        assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
        assert data.eval_results[0].metric_value == pytest.approx(result["lnfree_loss"], abs=1e-4)  # type: ignore[index]
        assert f"{result['kl']:.4f}" in text and f"{result['lnfree_loss']:.4f}" in text
        assert "`transformer.h.*.ln_1` (2 of them) | LayerNorm | `transformer.h.*.attn.c_attn`" in text
        assert "`transformer.ln_f` | LayerNorm | `lm_head`" in text
        assert "trust_remote_code=True" in text and "Nothing bounds the residual stream" in text
        assert str(finished_run.parent) not in text  # a card is read elsewhere

    def test_maps_that_stayed_as_modules_are_not_said_to_be_folded(
        self, finished_run: Path, result: dict[str, Any]
    ) -> None:
        sites, constants = load_sites(finished_run)
        some = [replace(site, folds_into="in place") if number < 2 else site for number, site in enumerate(sites)]
        text = " ".join(render_card(result, some, constants).split())
        assert "folded into the weights beside it; 2 of the maps remain as modules." in text
        assert "plain sum" not in text and "Nothing in it divides by the length of a token's vector" in text
        every = [replace(site, folds_into="in place") for site in sites]
        text = " ".join(render_card(result, every, constants).split())
        assert "left as a separate module." in text and "folded into the weights" not in text
        assert "plain sum that every layer" in render_card(result, sites, constants)

    def test_hub_names_are_linked(self, finished_run: Path, result: dict[str, Any]) -> None:
        named = result | {"model": "openai-community/gpt2", "data": "Skylion007/openwebtext:plain", "tokens": 2_000_000}
        text = render_card(named, *load_sites(finished_run))
        values = yaml.safe_load(text.split("---\n")[1])
        assert values["base_model"] == "openai-community/gpt2"
        assert values["datasets"] == ["Skylion007/openwebtext"]
        assert "fine-tuning run of 2\u202f000\u202f000 tokens" in text
        assert "base_model" not in yaml.safe_load(render_card(result).split("---\n")[1])


def test_losses_on_the_card_are_each_models_own(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    losses = {"teacher_loss": 3.125, "lnfree_loss": 3.25, "control_loss": 3.1875, "naive_loss": 7.5, "tokens": 10}
    text = render_card(result | losses, *load_sites(finished_run))
    for words, loss in (("of the original", "3.1250"), ("of this model", "3.2500"), ("after naive removal", "7.5000")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| loss {words}"))
        assert line.split(" | ")[1].startswith(loss), line
    assert "| loss increase | +0.1250" in text


def test_every_number_on_the_card_is_the_one_it_says(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    sites, _ = load_sites(finished_run)
    intervals = {"teacher_loss_ci": [1, 2], "lnfree_loss_ci": [3.0, 3.5], "loss_increase_ci": [0.0625, 0.5]}
    numbers = {"control_loss": 3.1875, "kl": 0.25, "jsd": 0.125, **intervals}
    text = render_card(result | numbers, sites, {site.name: 2.0 + place for place, site in enumerate(sites)})
    for said in ("same tokens) | 3.1875", "(+0.0625 to +0.5000)", "(3.0000 to 3.5000)", "| 2 to 4 |"):
        assert said in text, said
    entry = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]
    found = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert found == {"loss": pytest.approx(result["lnfree_loss"], abs=1e-5), "kl": 0.25}


def test_a_card_without_numbers_claims_none(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text()) | {"lnfree_loss": None, "kl": None}
    values = yaml.safe_load(render_card(result, *load_sites(finished_run)).split("---\n")[1])
    assert set(values) == {"library_name", "pipeline_tag", "tags"}


def test_weights_that_are_no_longer_those_that_were_proved_are_not_published(hub: Hub, run: Path) -> None:
    weights = load_file(run / "model" / "model.safetensors")
    weights["transformer.wte.weight"][5] *= 1000
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    assert "The proof of the run" in refusal(run, "me/twin") and hub.calls == []


def test_links_are_not_followed_to_what_is_not_the_runs(hub: Hub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    (run / "model" / "notes.txt").symlink_to(tmp_path / "private.txt")
    assert "has links in it (notes.txt)" in refusal(run, "me/twin") and not hub.calls
