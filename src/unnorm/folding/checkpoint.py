"""The files of a run directory: LN-free model, its unfolded form, and the sites."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unnorm.errors import UnnormError, first_few, short
from unnorm.folding.fold import FoldedWeights, empty_twin
from unnorm.isolation import alone
from unnorm.modeling import register_twin_class
from unnorm.modeling.modeling_unnorm import limit_neurons, limits_of
from unnorm.models.load import missing_weights
from unnorm.paths import named_path, write_text
from unnorm.run_directory import LIMITS, SITES, UNFOLDED, model_within
from unnorm.sites.norm_behaviour import gain_offset
from unnorm.sites.site import NormSite
from unnorm.taper.norms import TaperedNorm
from unnorm.taper.stand_ins import install

SHARD = "500MB"
"""Target size of a weight file; writing one takes up to twice as much memory."""


@dataclass(frozen=True, kw_only=True)
class _SavedSite(NormSite):
    constant_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]


_SAVED = TypeAdapter(list[_SavedSite])

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""In which a twin can be loaded."""


def load(path: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Load a twin from a run directory, from the `model/` in it, or from the hub after `push`.

    A directory with another model, such as the `control/` of a run, loads that model, with its norms.

    Args:
        path: a directory, or `OWNER/NAME` on the hub.
        dtype: dtype of the loaded weights, such as `torch.bfloat16` or `bfloat16`, whatever they were saved in.

    Returns:
        A transformers model on the CPU, in evaluation mode.

    Raises:
        UnnormError: there is no model, its files are damaged, or `dtype` is not one of torch's four float types.
    """
    known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if known not in DTYPES:
        raise UnnormError(f"A model can't be loaded in {dtype}. Choose from {', '.join(map(str, DTYPES))}.")
    with alone():
        return _load(model_within(fetched(named_path(path))), known)


def fetched(path: Path) -> Path:
    """The path itself if it exists or can't be a hub id (OWNER/NAME); otherwise the files of that hub model.

    Raises:
        UnnormError: the hub model can't be reached or does not exist.
    """
    of_a_run = (path.parent / SITES).is_file()  # What a run directory lacks is not on the hub.
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or of_a_run:
        return path
    try:
        return Path(snapshot_download(path.as_posix()))
    except Exception as error:  # The hub's errors are of many kinds.
        raise UnnormError(
            f"No model '{path}': neither a local directory nor a hub model that can be reached ({short(error)})."
        ) from error


def load_sites(directory: Path) -> tuple[list[NormSite], dict[str, float]]:
    """The former norm sites and their constant scales, from `sites.json`.

    Raises:
        UnnormError: the file is missing or is not what a run writes.
    """
    path = named_path(directory) / SITES
    try:
        sites = _SAVED.validate_python(json.loads(path.read_text(encoding="utf-8")))
        if not sites:
            raise ValueError("there is no site in it")
    except OSError as error:
        if not named_path(directory).is_dir():
            raise UnnormError(f"There is no directory '{directory}'. Give that of a finished run.") from error
        raise UnnormError(
            f"'{directory}' holds no finished run: there is no {SITES} in it. Give the directory of a finished run, "
            "or finish it with: unnorm remove --resume --out DIR"
        ) from error
    except ValueError as error:
        raise UnnormError(f"'{path}' is damaged ({short(error)}). Do the run again.") from error
    return [NormSite.from_json(row.to_json()) for row in sites], {row.name: row.constant_scale for row in sites}


def save_sites(directory: Path, sites: Sequence[NormSite], constants: dict[str, float]) -> None:
    """Write `sites.json`: all that is needed to rebuild the unfolded model and compare."""
    rows = [{**site.to_json(), "constant_scale": constants[site.name]} for site in sites]
    write_text(directory / SITES, json.dumps(rows, indent=2))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model with its tokenizer in transformers' format, in files of at most `SHARD`.

    Args:
        model: what to write.
        tokenizer: its tokenizer.
        directory: where to write it.
        state_dict: weights to write instead of its own.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    try:
        model.save_pretrained(
            directory, state_dict=state_dict, max_shard_size=SHARD, save_original_format=state_dict is None
        )
        tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise UnnormError(
            f"Could not write '{directory}': {error}. Free some space and run again with --resume."
        ) from error


def save_folded(
    model: PreTrainedModel, sites: Sequence[NormSite], tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Fold a model with affine stand-ins and write the twin shard by shard, with only one in memory at a time.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    weights = FoldedWeights(model, sites)
    twin = empty_twin(model, sites, weights)
    save_model(twin, tokenizer, directory, state_dict=_OneByOne(twin, weights))


class _OneByOne(dict[str, torch.Tensor]):
    """A state dict of meta tensors; each is folded when transformers pops it to write its shard."""

    def __init__(self, twin: PreTrainedModel, weights: FoldedWeights) -> None:
        super().__init__(twin.state_dict())
        self.weights = weights

    def pop(self, key: str, *default: Any) -> torch.Tensor:
        super().pop(key, *default)
        # A copy, since weights tied in the model must not be tied in the file.
        return self.weights[key].clone(memory_format=torch.contiguous_format)


def save_unfolded(
    model: PreTrainedModel,
    original: PreTrainedModel,
    sites: Sequence[NormSite],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write a model with stand-ins as a model of the original's class, its norms with the trained gain and bias.

    Loaded by stock code, its norms would divide by each token's own scale, and its neurons would have no limits;
    `load_unfolded` restores the constants and the limits.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    limits = {name: limit.detach().cpu() for name, limit in limits_of(model).items()}
    stock = _stock(model, original, sites)
    if limits:
        stock.config.limited_neurons = list(limits)
    save_model(stock, tokenizer, directory)
    if limits:
        save_limits(limits, directory)


def save_limits(limits: dict[str, torch.Tensor], directory: Path) -> None:
    """Write neuron limits next to the weights of an unfolded model.

    Raises:
        UnnormError: the disk is full or can't be written to.
    """
    try:
        save_file(limits, directory / LIMITS)
    except (OSError, SafetensorError) as error:
        raise UnnormError(f"Could not write '{directory / LIMITS}': {error}.") from error


def _stock(model: PreTrainedModel, original: PreTrainedModel, sites: Sequence[NormSite]) -> PreTrainedModel:
    limited = {f"{name}.limit" for name in limits_of(model)}
    weights = {key: value for key, value in model.state_dict().items() if key not in limited}
    plain = original.state_dict()
    for site in sites:
        stand_in = model.get_submodule(site.name)
        assert isinstance(stand_in, TaperedNorm)
        for key in [key for key in weights if key.startswith(f"{site.name}.")]:
            del weights[key]
        offset = gain_offset(original.get_submodule(site.name), site)
        weights |= _norm_weights(site.name, stand_in, offset, plain)
    if not model.config.tie_word_embeddings:  # Then no weights are tied when it is loaded again.
        weights = _none_shared(weights)
    return with_weights(original, deepcopy(model.config), weights, model.generation_config)


def with_weights(
    like: PreTrainedModel, config: PreTrainedConfig, weights: dict[str, torch.Tensor], generation: GenerationConfig
) -> PreTrainedModel:
    """A model of the class of `like` that holds the given weights themselves, not copies."""
    with init_empty_weights(include_buffers=False):
        model = type(like)(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = generation
    return model


def _none_shared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, with copies of those that share memory with an earlier one (Zamba), which would not be written."""
    first: dict[int, str] = {}
    return {
        key: weight if first.setdefault(weight.data_ptr(), key) == key else weight.clone()
        for key, weight in weights.items()
    }


def load_trained(directory: Path) -> tuple[PreTrainedModel, list[NormSite], dict[str, float]]:
    """The trained model in the original's class, its norms still normalizing, with sites and constant scales.

    Raises:
        UnnormError: files are missing or damaged.
    """
    sites, constants = load_sites(directory)
    model = _load(directory / UNFOLDED, torch.float32)
    _take_up_limits(model, directory / UNFOLDED)
    modules = {name for name, _ in model.named_modules() if name}
    unknown = {name for site in sites for name in (site.name, *site.readers, *site.writers)} - modules
    if unknown:
        raise UnnormError(
            f"'{directory / SITES}' is damaged: the model in '{directory / UNFOLDED}' has no "
            f"{', '.join(sorted(unknown))}. Do the run again."
        )
    for site in sites:
        gain = getattr(model.get_submodule(site.name), "weight", None)
        if gain is not None and gain.shape[-1] != site.width:
            raise UnnormError(
                f"'{directory / SITES}' is damaged: '{site.name}' is not {site.width} wide. Do the run again."
            )
    return model, sites, constants


def load_unfolded(directory: Path) -> PreTrainedModel:
    """The trained model before folding: affine stand-ins with the constants of `sites.json` at every site.

    Raises:
        UnnormError: files are missing or damaged.
    """
    model, sites, constants = load_trained(directory)
    for name, stand_in in install(model, sites).items():
        stand_in.log_constant = torch.full((2,), math.log(constants[name]), dtype=torch.float64)
        stand_in.removed = True
    return model


def _take_up_limits(model: PreTrainedModel, directory: Path) -> None:
    names = getattr(model.config, "limited_neurons", None)
    if not names:
        return
    try:
        limit_neurons(model, names, load_file(directory / LIMITS))
    except (OSError, SafetensorError, AttributeError, RuntimeError, KeyError) as error:
        raise UnnormError(
            f"'{directory / LIMITS}' is damaged ({short(error)}). Do the run again, or copy it again."
        ) from error


def _norm_weights(name: str, norm: TaperedNorm, offset: int, plain: dict[str, torch.Tensor]) -> dict[str, Any]:
    weights = {f"{name}.weight": norm.gain.detach() - offset}
    if norm.bias is not None:
        weights[f"{name}.bias"] = norm.bias.detach()
    return {key: value for key, value in weights.items() if key in plain}


def _load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise UnnormError(f"No model in '{path}': there is no config.json. Give the directory of a finished run.")
    damaged = f"The model in '{path}' is damaged"
    try:
        register_twin_class(path)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # A damaged config can make transformers raise anything.
        raise UnnormError(f"{damaged}: {short(error)} Do the run again, or copy it again.") from error
    if wrong := missing_weights(info):
        raise UnnormError(
            f"{damaged}: it lacks {first_few(wrong)}, or has them in another shape. Do the run again, or copy it again."
        )
    return model.eval()
