"""Tiny models and data that every test file shares; nothing here or in the tests needs the network."""

import gc
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "200"
for forces_color in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE"):
    os.environ.pop(forces_color, None)

# ruff: noqa: E402 (what follows reads the environment when it is imported)
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB = 300
POSITIONS = 64


class CliResult(NamedTuple):
    """What one run of the command line left: exit code and both streams."""

    code: int
    out: str
    err: str


Cli = Callable[..., CliResult]
Saved = Callable[[Any], Path]


def stdlib_text(*modules: str) -> str:
    """Source text of modules of the standard library: real text that is on every machine."""
    return "\n".join(inspect.getsource(sys.modules[name]) for name in modules)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, gains and biases large and random enough that every norm and every bias matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.15 * noise)
    return model


def small_llama() -> LlamaForCausalLM:
    """A Llama of 3 layers, 32 wide, with the tiny model's vocabulary and positions; a new one each time."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    randomize(model)
    return model.eval()


def with_other_tokens(model: Path, directory: Path) -> Path:
    """A copy of a model whose tokenizer gives two tokens each other's ids."""
    shutil.copytree(model, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, with 300 ids; end-of-text is id 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([stdlib_text("inspect", "os")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


@pytest.fixture(scope="session")
def tiny_model() -> GPT2LMHeadModel:
    """A GPT-2 of 2 layers, 32 wide, for 64 positions; don't change it in place."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return randomize(GPT2LMHeadModel(config)).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """`tiny_model` and `tiny_tokenizer` as transformers saves them; don't change it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 10,000 tokens, one document."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stdlib_text("os")[:20_000])
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path) -> Path:
    """A run directory as `unnorm remove --tokens 0` leaves it; don't change it."""
    from unnorm.removal.remove import remove

    out = tmp_path_factory.mktemp("runs") / "finished"
    remove(model=str(tiny_model_dir), data=str(text_file), tokens=0, out=out, device="cpu")
    return out


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> dict[str, Path]:
    """Finished runs by family of `tests.families`, made when first asked for; the original is in `../model`."""
    from tests.families import FAMILIES, IN_PLACE, random_model
    from unnorm.removal.remove import remove

    configs = {name: make for name, (make, _) in FAMILIES.items()} | IN_PLACE

    class Runs(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            root = tmp_path_factory.mktemp("family")
            config = configs[family]()
            config.vocab_size = len(tiny_tokenizer)
            random_model(lambda: config).save_pretrained(root / "model")
            tiny_tokenizer.save_pretrained(root / "model")
            remove(
                model=str(root / "model"),
                data=str(text_file),
                tokens=0,
                context=32,
                out=root / "run",
                device="cpu",
                in_place=family in IN_PLACE,
            )
            self[family] = root / "run"
            return self[family]

    return Runs()


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Saved:
    """Saves a model with the tiny tokenizer, in `tmp_path / "model"`."""

    def save(model: Any) -> Path:
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def saved_family(saved: Saved, tiny_tokenizer: PreTrainedTokenizerFast) -> Saved:
    """Saves a random model of a family, of which it gets a function that makes the config."""
    from tests.families import random_model

    def save(make: Callable[[], Any]) -> Path:
        config = make()
        config.vocab_size = len(tiny_tokenizer)
        return saved(random_model(lambda: config))

    return save


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process: `cli("stats", directory)` gives exit code, stdout and stderr.

    What is no user's error, and so would be a traceback, comes out as the exception that it is.
    """
    from unnorm import cli as command_line

    def run(*arguments: object) -> CliResult:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["unnorm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        out, err = capfd.readouterr()
        return CliResult(int(exit_.value.code or 0), out, err)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end one process would wait for them."""
    longest = ("test_tutorial_runs", "test_two_processes", "test_processes", "test_interrupted_and_resumed")
    items.sort(key=lambda item: not any(name in item.nodeid for name in longest))


def pytest_collection_finish() -> None:
    """What was imported is not searched for garbage, as every run does: that took a fifth of the time."""
    gc.collect()
    gc.freeze()
