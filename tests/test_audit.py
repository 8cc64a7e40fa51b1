"""The worst-case audit finds what is planted, measures what it says, and refuses what it can't compare."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unnorm
from tests.conftest import POSITIONS, VOCAB, Cli, randomize, small_llama, with_other_tokens
from unnorm.errors import UnnormError
from unnorm.folding.checkpoint import load
from unnorm.worst_case.audit import _worst, summarize, verdict
from unnorm.worst_case.inputs import Inputs, Material, input_classes
from unnorm.worst_case.measure import Measured, largest_residuals, measure

PLANTED = 123
FINITE = {"float32": True, "bfloat16": True, "float16": True}
EVERY_CLASS = [
    "ordinary text",
    "token alone",
    "token repeated",
    "token after text",
    "random tokens",
    "byte noise",
    "code",
    "other scripts",
    "digits",
    "white space",
    "end-of-text first",
    "end-of-text inside",
    "packed documents",
    "lengths",
    "left padding",
]


def as_control(run: Path, out: Path) -> Path:
    """A copy of a run whose control is its own twin, so that every class passes unless something is planted."""
    shutil.copytree(run, out)
    shutil.copytree(out / "model", out / "control")
    return out


def plant(run: Path, factor: float) -> None:
    """Scale one token's embedding in the twin."""
    twin = load(run)
    with torch.no_grad():
        twin.get_input_embeddings().weight[PLANTED] *= factor
    twin.save_pretrained(run / "model")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    return as_control(finished_run, tmp_path_factory.mktemp("audit") / "healthy")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, healthy: Path) -> Path:
    out = tmp_path_factory.mktemp("audit") / "planted"
    shutil.copytree(healthy, out)
    plant(out, 1000)
    return out


@pytest.fixture(scope="module")
def audited(healthy: Path) -> dict[str, Any]:
    return unnorm.audit(healthy, tokens=2048)


@pytest.fixture
def material(tiny_tokenizer: PreTrainedTokenizerFast) -> Material:
    text = torch.randint(1, VOCAB, (4096,), generator=torch.Generator().manual_seed(1))
    return Material(tiny_tokenizer, text, VOCAB, POSITIONS, 48, 1024, torch.Generator().manual_seed(0))


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["classes"]}


class TestHealthy:
    def test_every_class_passes_beside_an_equal_model(self, audited: dict[str, Any], healthy: Path) -> None:
        assert audited["passed"]
        assert audited["reference"] == str(healthy / "control")
        assert [row["name"] for row in audited["classes"]] == EVERY_CLASS
        for row in audited["classes"]:
            assert row["finite"] == FINITE, row["name"]
            assert row["loss"] == row["reference_loss"]
            assert row["residual_norm"] == row["reference_residual_norm"]
            assert 0 < row["float16_tokens"] <= row["bfloat16_tokens"] <= row["tokens"] > 0

    def test_the_same_seed_gives_the_same(self, audited: dict[str, Any], healthy: Path) -> None:
        assert unnorm.audit(healthy, tokens=2048) == audited

    def test_another_seed_gives_other_inputs(self, healthy: Path) -> None:
        some = {"tokens": 256, "context": 16}
        first, second = (by_name(unnorm.audit(healthy, seed=seed, **some)) for seed in (0, 1))
        for name in ("random tokens", "byte noise", "digits", "left padding"):
            assert first[name]["loss"] != second[name]["loss"], name

    def test_the_original_is_the_reference_of_a_run_without_control(
        self, finished_run: Path, tiny_model_dir: Path
    ) -> None:
        result = unnorm.audit(finished_run, tokens=512, context=16)
        assert result["reference"] == str(tiny_model_dir)
        row = by_name(result)["ordinary text"]
        assert row["loss"] != row["reference_loss"]


class TestPlanted:
    def test_is_found_and_named(self, planted: Path) -> None:
        result = unnorm.audit(planted, tokens=2048)
        rows = by_name(result)
        assert not result["passed"]
        for name in ("token alone", "token after text"):
            row = rows[name]
            assert not row["passed"], name
            assert row["worst"][0]["tokens"][-1] == PLANTED
            assert row["residual_norm"]["largest"] > 100 * row["reference_residual_norm"]["largest"]

    def test_float16_overflows(self, tmp_path: Path, healthy: Path) -> None:
        run = tmp_path / "overflowing"
        shutil.copytree(healthy, run)
        plant(run, 1e6)
        row = by_name(unnorm.audit(run, tokens=512, context=16))["token alone"]
        assert row["finite"] == {"float32": True, "bfloat16": True, "float16": False}
        assert row["reason"] == "NaN or infinite in float16"

    @pytest.mark.parametrize("able", [False, True])
    def test_bfloat16_is_tried_on_all_only_where_the_processor_has_it(
        self, able: bool, healthy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("unnorm.worst_case.audit.HALF_CPU_TOKENS", 16)
        monkeypatch.setattr("unnorm.worst_case.audit.computes_bfloat16", lambda _: able)
        for row in unnorm.audit(healthy, tokens=512, context=16)["classes"]:
            assert row["bfloat16_tokens"] == (row["tokens"] if able else row["float16_tokens"]), row["name"]

    def test_a_token_that_overflows_is_found_wherever_it_is(
        self, tmp_path: Path, healthy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also among the tokens that a model is tried on when it is loaded: those of an original are refused there."""
        run = tmp_path / "overflowing"
        shutil.copytree(healthy, run)
        twin = load(run)
        with torch.no_grad():
            twin.get_input_embeddings().weight[PLANTED] = 1e37 * twin.lm_head.weight[0].sign()
            twin.lm_head.weight[0] *= 30
        twin.save_pretrained(run / "model")
        shutil.rmtree(run / "control")
        monkeypatch.setattr("unnorm.models.load.trace_inputs", lambda model: torch.tensor([[5, PLANTED, 7, 9]]))
        row = by_name(unnorm.audit(run, tokens=512, context=16))["token alone"]
        assert not row["finite"]["float32"] and row["reference_finite"]["float32"]
        text = tmp_path / "text.txt"
        text.write_text("plain words without that token " * 200)
        (found,) = unnorm.evaluate(run, data=text, tokens=500)
        assert found.overflowed_blocks == 0 and found.kl is not None

    def test_the_residual_is_that_before_a_final_norm_that_was_kept(
        self, tiny_model_dir: Path, text_file: Path, tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"data": str(text_file), "tokens": 0, "device": "cpu"}
        unnorm.remove(str(tiny_model_dir), out=tmp_path / "run", keep="ln_f", **options)
        twin, read = load(tmp_path / "run"), list[float]()
        twin.transformer.ln_f.register_forward_pre_hook(lambda _, args: read.append(float(args[0].norm())))
        with torch.no_grad():
            for token in range(VOCAB):
                twin(input_ids=torch.tensor([[token]]))
        row = by_name(unnorm.audit(tmp_path / "run", tokens=512, context=16))["token alone"]
        assert row["residual_norm"]["largest"] == pytest.approx(max(read), rel=1e-5)

    def test_a_reference_of_another_class(
        self, finished_run: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        small_llama().save_pretrained(tmp_path / "llama")
        tiny_tokenizer.save_pretrained(tmp_path / "llama")
        row = by_name(unnorm.audit(finished_run, tmp_path / "llama", tokens=512, context=16))["token alone"]
        assert row["reference_residual_norm"]["largest"] > 0

    def test_a_directory_that_is_named_as_the_bundled_model(
        self, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(planted, tmp_path / "demo")
        monkeypatch.chdir(tmp_path)
        result = unnorm.audit("demo", tokens=512, context=16)
        assert not by_name(result)["token alone"]["passed"]


@pytest.fixture(params=[1000, 3])
def _at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many sequences go through the model at once: all, or some, with fewer in the last pass."""
    monkeypatch.setattr("unnorm.worst_case.measure._LOGITS_AT_ONCE", request.param * VOCAB * POSITIONS)


class TestFigures:
    def test_agree_with_an_independent_computation(self, audited: dict[str, Any], finished_run: Path) -> None:
        """Every token alone repeats nothing of the audit but the definition: the residual, and its percentiles."""
        twin = load(finished_run)
        norms = []
        for token in range(VOCAB):
            with torch.no_grad():
                hidden = twin(input_ids=torch.tensor([[token]]), output_hidden_states=True).hidden_states[-1]
            norms.append(float(hidden[0, 0].double().norm()))
        row = by_name(audited)["token alone"]["residual_norm"]
        assert row["largest"] == pytest.approx(max(norms), rel=1e-5)
        assert row["p99.9"] == pytest.approx(np.percentile(norms, 99.9, method="inverted_cdf"), rel=1e-5)

    @pytest.mark.usefixtures("_at_once")
    @pytest.mark.parametrize("name", EVERY_CLASS[:13])
    def test_loss_is_that_of_plain_transformers(self, name: str, material: Material, finished_run: Path) -> None:
        twin = load(finished_run)
        kind = next(kind for kind in input_classes(material, True) if kind.name == name)
        (part,) = kind.inputs
        expected = []
        for ids, targets in zip(part.ids, part.targets, strict=True):
            with torch.no_grad():
                log_p = F.log_softmax(twin(input_ids=ids[None]).logits[0].double(), dim=-1)
            expected += [-float(log_p[i, t]) for i, t in enumerate(targets.tolist()) if t >= 0]
        measured = measure(twin, kind.inputs, "transformer.ln_f")
        assert measured.finite
        np.testing.assert_allclose(measured.loss.numpy(), expected, atol=1e-4)
        for key, q in (("p99.9", 0.999), ("p99.99", 0.9999)):
            rank = int(np.ceil(q * len(expected))) - 1
            assert summarize(measured.loss)[key] == pytest.approx(sorted(expected)[rank], abs=1e-4)

    @pytest.mark.usefixtures("_at_once")
    def test_padding_changes_nothing(self, material: Material, finished_run: Path) -> None:
        twin = load(finished_run)
        (padded,) = next(kind for kind in input_classes(material, True) if kind.name == "left padding").inputs
        parts = []
        for ids, targets in zip(padded.ids, padded.targets, strict=True):
            real = targets >= 0
            parts.append(Inputs(ids[real][None], targets[real][None]))
        with_pads, without = (measure(twin, inputs, "transformer.ln_f") for inputs in ([padded], parts))
        torch.testing.assert_close(with_pads.loss, without.loss, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(with_pads.norm, without.norm, atol=1e-4, rtol=1e-4)


class TestClasses:
    def test_ids_are_of_the_vocabulary_and_fit(self, material: Material) -> None:
        for kind in input_classes(material, True):
            for part in kind.inputs:
                assert part.ids.shape == part.targets.shape
                assert part.ids.shape[1] <= POSITIONS
                assert part.ids.min() >= 0 and part.ids.max() < VOCAB
                assert part.read.any()

    def test_the_vocabulary_is_gone_through(self, material: Material) -> None:
        kinds = {kind.name: kind for kind in input_classes(material, True)}
        for name in ("token alone", "token after text"):
            assert kinds[name].inputs[0].ids[:, -1].tolist() == list(range(VOCAB))
            assert f"all {VOCAB}" in kinds[name].what
        assert f"16 of {VOCAB} tokens" in kinds["token repeated"].what
        assert kinds["token repeated"].inputs[0].ids[0].tolist() == [0] * POSITIONS  # end-of-text comes first
        assert [part.ids.shape[1] for part in kinds["lengths"].inputs][:: len(kinds["lengths"].inputs) - 1] == [1, 64]

    def test_what_is_made_of_text_begins_as_the_models_texts_do(self, material: Material) -> None:
        """As Gemma's, which knows no text without its first token."""
        begin = 77
        for kind in input_classes(replace(material, begin=begin), True):
            begun = True
            for part in kind.inputs:
                mask = torch.ones_like(part.ids) if part.attention_mask is None else part.attention_mask
                begun &= all(int(ids[real][0]) == begin for ids, real in zip(part.ids, mask.bool(), strict=True))
            odd = kind.name in {"token alone", "token repeated", "random tokens", "end-of-text first"}
            assert begun is not odd, kind.name

    def test_a_tokenizer_that_drops_white_space_has_no_such_class(self, material: Material) -> None:
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        words = replace(material, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
        ours, theirs = ([kind.name for kind in input_classes(m, True)] for m in (material, words))
        assert [name for name in ours if name not in theirs and "end-of-text" not in name and "packed" not in name] == [
            "white space"
        ]

    def test_late_positions_are_those_that_training_did_not_reach(self, material: Material) -> None:
        (late,) = [kind for kind in input_classes(material, True) if kind.name == "late positions"]
        assert late.inputs[0].read.nonzero()[:, 1].unique().tolist() == list(range(48, POSITIONS))

    def test_late_positions_are_those_after_the_context_that_a_run_chose(self, healthy: Path, tmp_path: Path) -> None:
        run = shutil.copytree(healthy, tmp_path / "run")
        result = json.loads((run / "result.json").read_text())
        result["plan"]["context"] = 32
        (run / "result.json").write_text(json.dumps(result))
        result = unnorm.audit(run, tokens=128)
        assert result["trained_context"] == 32 and "late positions" in by_name(result)

    def test_hold_what_they_are_named_for(self, material: Material) -> None:
        kinds = {kind.name: kind.inputs[0] for kind in input_classes(material, True)}
        assert (kinds["end-of-text first"].ids.cumsum(1) == 0).sum(1).tolist() == [1, 2, 3, 4] * 4
        assert (kinds["end-of-text inside"].ids == 0).any(1).all()
        padding = kinds["left padding"].attention_mask
        assert padding is not None and len(set((padding == 0).sum(1).tolist())) > 4
        assert torch.equal(kinds["ordinary text"].ids[:, 0], material.text[:: len(material.text) // 16])

    def test_positions_count_from_the_first_real_token(self, material: Material) -> None:
        (part,) = next(kind for kind in input_classes(material, True) if kind.name == "left padding").inputs
        assert part.attention_mask is not None and part.position_ids is not None
        for mask, positions in zip(part.attention_mask, part.position_ids, strict=True):
            pads = int((mask == 0).sum())
            assert positions.tolist() == [0] * pads + list(range(POSITIONS - pads))


class TestVerdict:
    def measured(self, *losses: float) -> Measured:
        return Measured(torch.tensor(losses, dtype=torch.float64), torch.ones(len(losses)), True)

    @pytest.mark.parametrize(("loss", "passes"), [(10.9, True), (11.1, False), (float("inf"), False)])
    def test_margin_of_the_percentile(self, loss: float, passes: bool) -> None:
        assert (verdict(self.measured(1, loss), self.measured(1, 10), FINITE, FINITE) == "") is passes

    def test_one_bad_token_among_many(self) -> None:
        many = [10.0] * 50_000
        assert verdict(self.measured(*many, 19), self.measured(*many, 10), FINITE, FINITE) == ""
        assert "largest loss" in verdict(self.measured(*many, 21), self.measured(*many, 10), FINITE, FINITE)

    def test_float16_counts_only_where_the_reference_is_finite(self) -> None:
        same, overflowing = self.measured(1), {**FINITE, "float16": False}
        assert verdict(same, same, overflowing, overflowing) == ""
        assert "float16" in verdict(same, same, overflowing, FINITE)
        assert "bfloat16" in verdict(same, same, {**FINITE, "bfloat16": False}, {**FINITE, "bfloat16": False})

    def test_the_largest_residuals_are_taken(self) -> None:
        ids = torch.arange(24).view(2, 3, 4)
        parts = [Inputs(part, torch.ones(3, 4, dtype=torch.long)) for part in ids]
        for place, sequence in ((21, [20, 21, 22, 23]), (5, [4, 5, 6, 7])):
            norm = torch.ones(24)
            norm[place] = 50
            for norms in ([norm, torch.ones(24)], [torch.ones(24), norm]):
                assert [part.ids.tolist() for part in largest_residuals(parts, norms, 4)] == [[sequence]]

    def test_the_worst_are_those_where_the_twin_is_worse(self, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        ids = torch.tensor([[1, 2, 3]])
        ours, theirs = self.measured(9, 5, 3), self.measured(9, 1, 3)
        assert _worst([Inputs(ids, ids)], ours, theirs, tiny_tokenizer)[0]["position"] == 1


class TestCommand:
    def test_passes(self, healthy: Path, cli: Cli) -> None:
        code, out, err = cli("audit", healthy, "--tokens", "512", "--context", "16")
        assert code == 0, err
        assert "all 15 classes passed" in out
        assert "FAILED" not in out

    def test_fails(self, planted: Path, cli: Cli) -> None:
        code, out, _ = cli("audit", planted, "--tokens", "512", "--context", "16")
        assert code == 1
        assert "FAILED" in out

    def test_json(self, planted: Path, cli: Cli) -> None:
        code, out, _ = cli("audit", planted, "--tokens", "512", "--context", "16", "--json")
        assert code == 1
        result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert not by_name(result)["token alone"]["passed"]


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        code, out, err = cli("audit", *arguments)
        assert code == 2 and not out and "Traceback" not in err
        return " ".join(err.split())

    return run


class TestBadInput:
    def test_no_run(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        assert "holds no finished run" in refused(tmp_path)

    def test_no_reference(self, tmp_path: Path, finished_run: Path, refused: Callable[..., str]) -> None:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        (run / "config.yaml").write_text("model: gone-away\n")
        text = refused(run)
        assert "No model 'gone-away'" in text and "--against" in text
        (run / "config.yaml").unlink()
        assert "Name the original with --against" in refused(run)
        assert "No model 'no-such-model'" in refused(run, "--against", "no-such-model")

    def test_no_text(
        self, tmp_path: Path, finished_run: Path, tiny_model_dir: Path, refused: Callable[..., str]
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        (run / "config.yaml").write_text(f"model: {tiny_model_dir}\ndata: {tmp_path}/gone.txt\n")
        assert "name other text with --data" in refused(run)

    def test_another_vocabulary(
        self, tmp_path: Path, finished_run: Path, tiny_tokenizer: PreTrainedTokenizerFast, refused: Callable[..., str]
    ) -> None:
        config = GPT2Config(vocab_size=VOCAB + 20, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        randomize(GPT2LMHeadModel(config)).save_pretrained(tmp_path / "other")
        tiny_tokenizer.save_pretrained(tmp_path / "other")
        assert "vocabularies differ" in refused(finished_run, "--against", tmp_path / "other")

    def test_another_tokenizer(
        self, tmp_path: Path, finished_run: Path, tiny_model_dir: Path, refused: Callable[..., str]
    ) -> None:
        other = with_other_tokens(tiny_model_dir, tmp_path / "other")
        assert "different tokenizers: 2 tokens" in refused(finished_run, "--against", other)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--context", "65"), "longer than the 64 tokens"),
            (("--tokens", "0"), "at least 1 token"),
            (("--tokens", "many"), "not a number of tokens"),
            (("--device", "abacus"), "No device 'abacus'"),
            (("--seed", 2**70), "'--seed'"),
        ],
    )
    def test_options(
        self, options: tuple[str, ...], says: str, finished_run: Path, refused: Callable[..., str]
    ) -> None:
        assert says in refused(finished_run, *options)

    def test_from_python(self, tmp_path: Path) -> None:
        with pytest.raises(UnnormError, match="There is no directory"):
            unnorm.audit(tmp_path / "nothing")
