"""The twin in TransformerLens 4: a `TransformerBridge` whose normalization components do nothing.

TransformerLens finds an architecture adapter by the name of the model's class. The adapter registered here for
`Unnorm<Class>` is that of `<Class>` with each normalization component replaced by one that passes its input on. (The
stock component computes a LayerNorm itself, whatever module it wraps; the RMSNorm one, around an identity, fires
`hook_scale` and `hook_normalized` but ignores edits at them.)
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from unnorm.errors import UnnormError, short
from unnorm.exports.measure import PROBE_SHAPE, compare, refuse_kept_norms
from unnorm.folding.checkpoint import fetched, load
from unnorm.isolation import isolated
from unnorm.modeling.modeling_unnorm import PREFIX
from unnorm.models.load import load_tokenizer
from unnorm.models.probe import trace_inputs
from unnorm.models.tokenizer import begin_of_text
from unnorm.paths import named_path
from unnorm.run_directory import model_within
from unnorm.sites.find import norm_modules

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.1
"""Allowed difference from the twin's logits, relative to the largest logit, in float32 and in half precision."""

_IN_TRANSFORMERS = "Use the model in transformers: unnorm.load(...) and hooks."


@isolated
def to_transformer_lens(
    directory: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> "TransformerBridge":
    """The LN-free model of a run as a `TransformerBridge` whose `cfg.normalization_type` is None.

    Its logits are those of the checkpoint. `ln1`, `ln2` and `ln_final` are still there, but only as `hook_in` and
    `hook_out` around an identity; they have no `hook_scale` and no `hook_normalized`. The twin's unembedding has a bias
    where the norm had one: add `b_U` when summing attributions. Attributions sum to the logits before any factor or
    soft cap that the family applies to them (Granite, Cohere, Gemma 2).

    Args:
        directory: run directory, the `model/` in it, or `OWNER/NAME` on the hub.
        dtype: dtype of the weights.
        device: device of the weights.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        UnnormError: TransformerLens is not installed, has no adapter for the family, or its adapter computes other
            logits; or there is no LN-free model, or it still has norms (`--keep`) or affine maps (`--in-place`).
    """
    _import_transformer_lens()
    from transformer_lens.model_bridge import TransformerBridge

    path = model_within(fetched(named_path(directory)))
    twin = load(path, dtype)
    try:
        twin.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise UnnormError(f"No device '{device}' here ({short(error)}). Choose another, such as cpu.") from error
    _refuse_what_a_bridge_would_leave_out(twin, path)
    register_adapter(type(twin).__name__)
    # Without a tokenizer the bridge asks the hub for one.
    tokenizer = load_tokenizer(str(directory), path, trust_remote_code)
    tokenizer.init_kwargs["trust_remote_code"] = trust_remote_code  # The bridge loads it once more, and would ask.
    ids = trace_inputs(twin, *PROBE_SHAPE, begin_of_text(tokenizer))
    with torch.no_grad():
        expected = twin(input_ids=ids, use_cache=False).logits  # Before the bridge takes over its modules.
        try:
            bridge = TransformerBridge.boot_transformers(
                str(path), hf_model=twin, tokenizer=tokenizer, dtype=twin.dtype, device=str(twin.device)
            )
            found = bridge(ids)
        except Exception as error:
            raise UnnormError(
                f"TransformerLens can't load this {type(twin).__name__.removeprefix(PREFIX)} ({short(error)}). "
                f"{_IN_TRANSFORMERS}"
            ) from error
    difference = compare("bridge", expected, found).relative
    if not difference <= (TOLERANCE if torch.finfo(expected.dtype).bits >= 32 else HALF_TOLERANCE):
        raise UnnormError(
            f"TransformerLens computes different logits from the model in '{path}' (by {difference:.1e} of the "
            f"largest): its adapter for {type(twin).__name__.removeprefix(PREFIX)} does not cover all of it. "
            f"{_IN_TRANSFORMERS}"
        )
    show_limits(bridge)
    return bridge


def _refuse_what_a_bridge_would_leave_out(twin: PreTrainedModel, path: Path) -> None:
    refuse_kept_norms(twin, "A bridge")
    if norm_modules(twin) or not type(twin).__name__.startswith(PREFIX):
        raise UnnormError(
            f"The model in '{path}' is not an LN-free model made by unnorm. Give the directory of a finished run."
        )
    if twin.config.affine_maps:
        raise UnnormError(
            f"The model in '{path}' has affine maps where norms were (--in-place), at "
            f"{', '.join(twin.config.affine_maps)}. A bridge whose norms do nothing would leave them out; use "
            "the model in plain transformers."
        )


def show_limits(bridge: "TransformerBridge") -> None:
    """Clamp limited neurons at `mlp.hook_post`, so that it shows what the MLP writes; these hooks survive resets.

    For bridges made by `boot_transformers`; `to_transformer_lens` does it itself.
    """

    def held(writer: torch.nn.Module) -> Any:
        def clamp(neurons: torch.Tensor, hook: Any) -> torch.Tensor:
            limit = writer.get_buffer("limit").to(neurons)  # Read each time: the bridge may have moved.
            return neurons.clamp(-limit, limit)

        return clamp

    for component in bridge.modules():
        writer = component._modules.get("_original_component")
        if writer is not None and "limit" in writer._buffers and hasattr(component, "hook_in"):
            component.hook_in.add_perma_hook(held(writer))


def register_adapter(architecture: str) -> None:
    """Register an LN-free class with TransformerLens, so that `boot_transformers` accepts its checkpoints.

    Args:
        architecture: name of the class, such as `UnnormGPT2LMHeadModel`.

    Raises:
        UnnormError: TransformerLens is not installed, or has no adapter for the stock class.
    """
    _import_transformer_lens()
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    stock = architecture.removeprefix(PREFIX)
    if stock not in SUPPORTED_ARCHITECTURES:
        raise UnnormError(f"TransformerLens has no adapter for {stock}. {_IN_TRANSFORMERS}")
    if architecture not in SUPPORTED_ARCHITECTURES:
        adapter = _norm_free_adapter(SUPPORTED_ARCHITECTURES[stock], stock)
        SUPPORTED_ARCHITECTURES[architecture] = adapter
        ArchitectureAdapterFactory.register_adapter(architecture, adapter)


def _import_transformer_lens() -> None:
    try:
        import transformer_lens.model_bridge  # noqa: F401
    except ImportError as error:
        raise UnnormError(
            f"TransformerLens 4 can't be imported ({short(error)}). Install it with: pip install 'unnorm[lens]'"
        ) from error


def _norm_free_adapter(stock: type[Any], architecture: str) -> type[Any]:
    """The stock adapter's subclass without norms."""

    def initialize(self: Any, cfg: Any) -> None:
        super(made, self).__init__(cfg)
        # Decisions that TransformerLens bases on the architecture's name apply to the twin as well.
        self.cfg.architecture = architecture
        self.cfg.normalization_type = None
        self.cfg.uses_rms_norm = False
        _replace_norms(self.component_mapping)

    made: type[Any] = type(PREFIX + stock.__name__, (stock,), {"__init__": initialize, "__doc__": "Without norms."})
    return made


def _replace_norms(components: Any) -> None:
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge

    for key, component in list(components.items()):
        if isinstance(component, NormalizationBridge):
            components[key] = _no_norm()(component.name, component.config, optional=component.optional)
        elif getattr(component, "submodules", None):
            _replace_norms(component.submodules)


@cache
def _no_norm() -> type[Any]:
    """The replacement component's class, created lazily because its base class needs TransformerLens."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    class NoNorm(GeneralizedComponent):
        """Stands where a norm was: passes its input on through `hook_in` and `hook_out`."""

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            """Return a copy of the input, with hooks applied.

            The copy protects the residual stream from hooks at `hook_out` that write in place, as a norm's output does.
            """
            return self.hook_out(self.hook_in(hidden_states).clone())

    return NoNorm
