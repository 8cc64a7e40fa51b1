"""The input and the result of every analysis."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unnorm.analysis.anatomy import Anatomy, anatomy
from unnorm.analysis.prompts import PromptPair
from unnorm.data import batches
from unnorm.sites.site import NormSite


@dataclass(frozen=True)
class Subject:
    """One of the two models, with its parts."""

    name: str
    model: PreTrainedModel
    anatomy: Anatomy


@dataclass(frozen=True)
class Material:
    """The input of an analysis.

    Attributes:
        original: the model with norms.
        twin: its norm-free twin, on the same device.
        tokenizer: the tokenizer of both.
        blocks: held-out text as rows of `input_ids`, all of the same length.
        prompts: pairs of prompts, or the reason why there are none.
        sites: the former norm sites of the twin.
        constants: the constant scale of each site, as folded.
        batch_size: blocks in one forward pass.
    """

    original: PreTrainedModel
    twin: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: Dataset
    prompts: Sequence[PromptPair] | str
    sites: Sequence[NormSite]
    constants: dict[str, float]
    batch_size: int = 4

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Both models by name, in float32 as loaded."""
        return {"original": self.original, "twin": self.twin}

    @property
    def keeps_final_norm(self) -> bool:
        """Whether the twin still has its final norm, because the removal was told to keep it."""
        _, twin = self.subjects
        return twin.anatomy.norm is not None

    @cached_property
    def subjects(self) -> list[Subject]:
        """Both models with their parts."""
        return [Subject(name, model, anatomy(model)) for name, model in self.models.items()]

    def batches(self, device: torch.device) -> Iterator[Int[Tensor, "batch position"]]:
        """Batches of the held-out text."""
        return batches(self.blocks, self.batch_size, device)


@dataclass(frozen=True)
class Finding:
    """The result of one analysis.

    Attributes:
        key: its name on the command line.
        title: its heading.
        text: what is shown, and how it is computed.
        numbers: plain values, as in `analysis.json`.
        figures: by name.
        captions: by figure name.
        legends: legend entries by figure name: label, key of a page colour, and shape of the legend key.
        headline: name, value and explanation of its headline number.
    """

    key: str
    title: str
    text: str
    numbers: dict[str, Any]
    figures: dict[str, Figure]
    captions: dict[str, str]
    headline: tuple[str, str, str]
    legends: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
