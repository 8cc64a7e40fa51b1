"""A finished run's twin and the model with norms that it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.errors import UnnormError, explained
from unnorm.folding.checkpoint import load_sites
from unnorm.models.comparable import check_same_tokenizer, check_same_vocabulary
from unnorm.models.load import load_original, model_name
from unnorm.models.sizes import vocabulary_size
from unnorm.progress import Watch, say
from unnorm.run_directory import CONFIG_FILE, CONTROL, MODEL
from unnorm.runs.config import run_settings
from unnorm.sites.site import NormSite


@dataclass(frozen=True)
class Pair:
    """A twin and a reference model with norms, both in float32, with the same tokenizer.

    Attributes:
        name: name of the reference.
        reference: the model with norms.
        twin: the run's twin.
        tokenizer: the tokenizer of both.
        sites: the twin's former norm sites.
        constants: the constant scale of each site, as folded.
        settings: the run's settings, as saved.
    """

    name: str
    reference: PreTrainedModel
    twin: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: list[NormSite]
    constants: dict[str, float]
    settings: dict[str, Any]


def open_pair(
    directory: Path,
    against: str | Path | None,
    control_first: bool,
    device: str,
    trust_remote_code: bool,
    watch: Watch,
) -> Pair:
    """Load the twin of a finished run and the reference it is compared with.

    Args:
        directory: the run directory.
        against: the reference; by default the run's control or original.
        control_first: whether the default is the run's control, if it has one, rather than its original.
        device: device that both are put on.
        trust_remote_code: run modeling code that comes with the models.
        watch: told what is loaded.

    Raises:
        UnnormError: there is no finished run, the reference can't be loaded or is not named, or the two models have
            different tokenizers or vocabulary sizes.
    """
    sites, constants = load_sites(directory)
    settings = run_settings(directory)
    name = model_name(against or _own_reference(directory, settings, control_first))
    say(watch, f"loading {directory} and {name}")
    with explained(against is None, "The run's own reference can't be used.", "Or name another with --against."):
        reference, tokenizer = load_original(name, trust_remote_code)
    twin, its_tokenizer = load_original(str(directory / MODEL), trust_remote_code)
    check_same_vocabulary(str(directory), vocabulary_size(twin), name, vocabulary_size(reference))
    check_same_tokenizer(str(directory), its_tokenizer, name, tokenizer)
    return Pair(name, reference.to(device), twin.to(device), tokenizer, sites, constants, settings)


def _own_reference(directory: Path, settings: Mapping[str, Any], control_first: bool) -> str:
    control = directory / CONTROL
    if control_first and (control / "config.json").is_file() and any(control.glob("*.safetensors")):
        return str(control)
    if settings.get("model"):
        return str(settings["model"])
    raise UnnormError(
        f"'{directory / CONFIG_FILE}' is missing or names no original, so there is nothing to compare with. Name the "
        "original with --against."
    )
