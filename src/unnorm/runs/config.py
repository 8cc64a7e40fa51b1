"""The settings of one run: what the user may choose."""

import glob
import math
import os
import re
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from unnorm.data import OWN_TEXT, STDLIB
from unnorm.errors import UnnormError
from unnorm.models.load import DEMO
from unnorm.paths import write_text
from unnorm.run_directory import CONFIG_FILE, SITES, finished_result
from unnorm.taper.norms import Estimator
from unnorm.taper.recipes import RecipeName
from unnorm.taper.schedule import KL_BUDGET


class RemoveConfig(BaseModel):
    """Every option of `unnorm remove`; None means that it is chosen from the model, the recipe and the machine."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(default=DEMO, description="'demo' (bundled), a local directory, a GGUF file or a hub id")
    twin: Path | None = Field(default=None, description="finished run whose twin is healed further; norms go at once")
    data: str = Field(
        default=STDLIB,
        description="'stdlib', a file, directory or glob, a hub data set, or 'self': what the model writes",
    )
    text_field: str | None = Field(default=None, description="column that holds the text")
    split: str = Field(default="train", description="split that training text comes from")
    out: Path | None = Field(default=None, description="run directory; by default a new one named after the model")
    recipe: RecipeName = Field(default="taper", description="'taper', 'sequential', 'sequential-aux' or 'tapernorm'")
    tokens: int | None = Field(
        default=None, ge=0, description="training tokens (2M, 150M); 0 only calibrates and folds"
    )
    batch_size: int | None = Field(default=None, ge=1, description="blocks for each optimizer step, over all processes")
    micro_batch: int | None = Field(
        default=None, ge=1, description="of these at once at most on each device; by memory"
    )
    context: int | None = Field(default=None, ge=2, description="tokens in a block")
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="peak learning rate")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything random")
    device: str = Field(default="auto", description="'auto' (cuda or else cpu), 'cpu', 'cuda' or 'mps' (not tested)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="precision of the training passes"
    )
    compile: bool = Field(
        default=False, description="torch.compile the training passes: minutes of work before the first"
    )
    cuda_graph: bool | None = Field(default=None, description="on a GPU, record each training step once and replay it")
    control: bool = Field(
        default=False, description="also fine-tune the original, norms kept, on as many tokens of the same text"
    )
    kl_budget: float = Field(
        default=KL_BUDGET,
        gt=0,
        allow_inf_nan=False,
        description="KL on the way, nats per token, at which the taper waits",
    )
    stress_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="share of the distilled blocks that no corpus has: random, repeated, foreign tokens",
    )
    self_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of the training text that the original writes itself"
    )
    keep: str | None = Field(default=None, description="regular expression of norms that stay norms")
    in_place: bool = Field(default=False, description="let maps that fold into no weight stay as modules")
    neuron_limits: bool = Field(
        default=True,
        description="limit neurons of quadratic MLPs where a token could run away without norms",
    )
    estimator: Estimator = Field(default="geometric", description="how the constant scale is estimated")
    trust_remote_code: bool = Field(default=False, description="run modeling code that comes with the model")
    report_to: list[str] = Field(default_factory=list, description="wandb, trackio, tensorboard, …")

    @field_validator("model", "data", "device", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path | torch.device) else value

    @field_validator("tokens", mode="before")
    @classmethod
    def _parse_tokens(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, str) else value

    @field_validator("control")
    @classmethod
    def _something_to_train_on(cls, control: bool, others: ValidationInfo) -> bool:
        if control and others.data.get("tokens") == 0:
            raise ValueError("without training tokens, the control is the original; leave it out, or give --tokens")
        return control

    @field_validator("self_share")
    @classmethod
    def _beside_a_corpus(cls, share: float, others: ValidationInfo) -> float:
        if share and others.data.get("data") == OWN_TEXT:
            raise ValueError(f"with --data {OWN_TEXT} the model writes all text; leave it out, or name a corpus")
        return share

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _installed_trackers(cls, names: list[str]) -> list[str]:
        if names == ["all"]:
            names = get_available_reporting_integrations()
        for name in names:
            try:
                for tracker in get_reporting_integration_callbacks(name):
                    tracker()
            except Exception as error:  # transformers reports what is missing with many kinds of errors.
                raise ValueError(" ".join(str(error).split()).removesuffix(".")) from error
        return names

    @classmethod
    def create(cls, **options: Any) -> "RemoveConfig":
        """Check options.

        Raises:
            UnnormError: options are unknown or have invalid values; the message names all of them.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            wrong = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
            ]
            unknown = any(e["type"] == "extra_forbidden" for e in error.errors())
            known = f" Known: {', '.join(cls.model_fields)}." if unknown else ""
            raise UnnormError(f"Invalid settings: {'; '.join(wrong)}.{known}") from error

    def to_saved(self) -> dict[str, Any]:
        """The settings as they are saved: paths are absolute, so that the run can be resumed from any directory."""
        saved = self.model_dump(mode="json")
        names = {"model": (DEMO,), "data": (STDLIB, OWN_TEXT), "twin": (), "out": ()}
        for key, no_paths in names.items():
            if saved[key] is not None and saved[key] not in no_paths:
                saved[key] = absolute_source(saved[key])
        return saved

    def save(self, path: Path) -> None:
        """Write the settings as YAML, unless the file holds them already.

        Raises:
            UnnormError: the disk is full or can't be written to.
        """
        text = yaml.safe_dump(self.to_saved(), sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def absolute_source(source: str) -> str:
    """The absolute path of a local file, directory or glob; anything else, such as a hub id, is returned as it is."""
    path = os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 (pathlib's raise, or follow links)
    return path if os.path.lexists(path) or glob.glob(path) else source  # noqa: PTH207 (Path.glob takes no absolute pattern)


def parse_count(text: str) -> int:
    """`150M` -> 150000000; also k, B/G, decimals and underscores.

    Raises:
        ValueError: the text is not such a number.
    """
    match = re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([kKmMbBgG]?)\s*", text)
    if not match or ("." in match[1] and not match[2]):
        raise ValueError(f"'{text}' is not a number of tokens; write 500000, 500k, 2M or 1.5B")
    factor = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}[match[2].lower()]
    count = float(match[1].replace("_", "")) * factor
    if not math.isfinite(count):
        raise ValueError("that number is too large")
    return round(count)


def read_count(tokens: int | str) -> int:
    """A number of tokens, given as an integer or as text for `parse_count`.

    Raises:
        UnnormError: the text is not such a number.
    """
    try:
        return parse_count(tokens) if isinstance(tokens, str) else int(tokens)
    except (ValueError, OverflowError, TypeError) as error:
        raise UnnormError(f"--tokens: {error}.") from error


def check_seed(seed: int) -> int:
    """A seed as Python's own integer.

    Raises:
        UnnormError: it is not a whole number from 0 to 2^32 - 1.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise UnnormError(f"--seed {seed}: give a whole number from 0 to {2**32 - 1}.")
    return int(seed)


def read_config_file(path: Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        UnnormError: the file can't be read, is not a mapping, or has unknown options.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # An impossible date raises ValueError.
        said = " ".join(str(error).split())
        raise UnnormError(f"Could not read the settings in '{path}': {said}. Give a YAML file.") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UnnormError(f"'{path}' holds no settings: write one 'option: value' per line.")
    named = {str(key).replace("-", "_"): value for key, value in options.items()}
    unknown = [name for name in named if name not in RemoveConfig.model_fields]
    if unknown:
        raise UnnormError(
            f"'{path}' has unknown settings: {', '.join(unknown)}. Known: {', '.join(RemoveConfig.model_fields)}."
        )
    return named


def trained_context(directory: Path) -> int | None:
    """Tokens in a block that a run trained on, from its plan or else its settings; None for any other directory.

    The directory is the run's, or that of its twin or its control.
    """
    if not (directory / CONFIG_FILE).is_file() and (directory.parent / SITES).is_file():
        directory = directory.parent
    with suppress(UnnormError, TypeError, ValueError, KeyError):
        return int(finished_result(directory)["plan"]["context"])
    with suppress(UnnormError):
        return run_settings(directory).get("context")
    return None


def run_settings(directory: Path) -> dict[str, Any]:
    """The settings that a run was started with, and the text's `division` if it is finished; empty without their file.

    Raises:
        UnnormError: the file can't be read.
    """
    path = directory / CONFIG_FILE
    settings = read_config_file(path) if path.is_file() else {}
    with suppress(UnnormError):
        result = finished_result(directory)
        if settings.get("data") in (result.get("data"), absolute_source(str(result.get("data")))):
            settings["division"] = result.get("division")
    return settings
