"""A closed-form step before training: bring the first position to the constant scale at norms that follow a projection.

A norm of keys, or one after a sublayer, normalizes what a projection W writes, and ignores its scale. Attention sinks
make use of that: the key of the first token, which all others attend to, is often several times shorter before its norm
than other keys, so that with a constant in its place attention leaves the sink (in Gemma 3 270M that alone costs three
nats). With x_0 what W reads at the first position, C the mean of x x' at all other positions, and d the log scale at
the first position minus the log constant, W becomes

    W + (exp(-d) - 1) (W x_0) u',    u = C^-1 x_0 / (x_0' C^-1 x_0)

This multiplies W x_0 by exp(-d), which the norm undoes, and changes what is written elsewhere as little as possible:
it is the rank-one edit of ROME (Meng et al. 2022, arXiv 2202.05262, equation 2), which inserts a value at one key. Each
head that is normalized on its own has its own d.

It is done where the first position reads nearly the same in every block, as in models with a begin-of-text token or a
massive activation there. For norms inside attention, and likewise for those after sublayers, all edits are kept if they
bring the model closer to the original with these norms partly tapered, and none otherwise.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from unnorm.calibration.equalize import mean_kl
from unnorm.calibration.scales import collect_log_scales, set_constants
from unnorm.data import batches, evenly_spaced
from unnorm.hooks import recorded
from unnorm.models.linear import is_linear, linear_weight
from unnorm.models.running import evaluating
from unnorm.sites.find import inside_attention
from unnorm.sites.norm_behaviour import centered, log_scale_of
from unnorm.sites.site import NormSite
from unnorm.taper.norms import Estimator, TaperedNorm

OFF = 0.3
"""Distance of a log scale from the log constant from which a head is edited."""
ALIKE = 0.3
"""Largest distance of what the first position reads from its mean over blocks, relative to that mean."""
ABOVE_EPS = 3.0
"""A variance under this many eps is left alone: its norm hardly acts, and the edit would not be undone by it."""
RIDGE = 1e-4
"""Added to the diagonal of C, relative to its mean."""
TRIED = 0.25
"""Alpha at which an edit has to bring the model closer to the original."""
KL_BLOCKS, BATCH = 4, 4


def equalize_first_position(
    student: PreTrainedModel,
    original: PreTrainedModel,
    sites: Sequence[NormSite],
    stand_ins: dict[str, TaperedNorm],
    blocks: Dataset,
    estimator: Estimator,
) -> list[str]:
    """Edit the projections before norms, as above, where that helps.

    Args:
        student: the model with calibrated stand-ins, which still act as norms; changed in place.
        original: the original, on the same device.
        sites: its norm sites.
        stand_ins: the stand-ins at these sites.
        blocks: calibration text.
        estimator: estimator of the constant scales, which are measured again.

    Returns:
        Names of the sites whose projections were edited.
    """
    following = _after_projections(student, sites)
    inside = [site for site in following if inside_attention(original, site.name)]
    kept: list[str] = []
    for group in (inside, [site for site in following if site not in inside]):
        edited = _try(student, original, group, stand_ins, blocks) if group else []
        if edited:
            set_constants(stand_ins, collect_log_scales(student, sites, blocks), estimator)
        kept += edited
    return kept


def _after_projections(model: PreTrainedModel, sites: Sequence[NormSite]) -> list[NormSite]:
    """Sites that fold into a linear layer whose outputs are all theirs."""
    following = [
        site for site in sites if site.folds_into == "writer" and is_linear(model.get_submodule(site.writers[0]))
    ]
    return [
        site
        for site in following
        if linear_weight(model.get_submodule(site.writers[0])).shape[0] % site.width == 0
        and sum(other.writers[0] == site.writers[0] for other in following) == 1
    ]


def _try(
    student: PreTrainedModel,
    original: PreTrainedModel,
    group: Sequence[NormSite],
    stand_ins: dict[str, TaperedNorm],
    blocks: Dataset,
) -> list[str]:
    some = evenly_spaced(blocks, KL_BLOCKS)
    concerned = [stand_ins[site.name] for site in group]
    edits = _edits(student, group, stand_ins, blocks)
    if not edits:
        return []
    before = _tapered_kl(student, original, concerned, some)
    weights = {name: linear_weight(student.get_submodule(name)) for name in edits}
    unedited = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, edit in edits.items():
        weights[name].data += edit
    if _tapered_kl(student, original, concerned, some) < before:
        return [site.name for site in group if site.writers[0] in edits]
    for name, weight in unedited.items():
        weights[name].data.copy_(weight)
    return []


def _tapered_kl(
    student: PreTrainedModel, original: PreTrainedModel, stand_ins: Sequence[TaperedNorm], blocks: Dataset
) -> float:
    for stand_in in stand_ins:
        stand_in.alpha.fill_(TRIED)
    try:
        return mean_kl(student, original, blocks)
    finally:
        for stand_in in stand_ins:
            stand_in.alpha.zero_()


@torch.no_grad()
def _edits(
    model: PreTrainedModel, sites: Sequence[NormSite], stand_ins: dict[str, TaperedNorm], blocks: Dataset
) -> dict[str, Float[Tensor, "out in"]]:
    """What to add to the projection before each site, by the projection's path; only those that change."""
    reads = _reads(model, [site.writers[0] for site in sites], blocks)
    edits = {}
    for site in sites:
        projection, first, moments = model.get_submodule(site.writers[0]), *reads[site.writers[0]]
        x = first.mean(0)
        if float((first - x).norm(dim=-1).mean()) > ALIKE * float(x.norm()):
            continue
        written = _written(projection, x).view(-1, site.width)
        factors = _factors(written, site, stand_ins[site.name])
        if bool((factors == 1).all()):
            continue
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        direction = torch.linalg.solve(moments + ridge, x)
        direction = direction / (x @ direction)
        change = ((factors - 1)[:, None] * written).flatten()
        edits[site.writers[0]] = torch.outer(change, direction).to(linear_weight(projection).dtype)
    return edits


def _factors(written: Float[Tensor, "head width"], site: NormSite, stand_in: TaperedNorm) -> Float[Tensor, " head"]:
    """What each head's output at the first position is multiplied by: exp(-d), or 1 where it is left alone."""
    log_scale = log_scale_of(centered(written, site.centered), site.eps).squeeze(-1)
    off = log_scale - stand_in.log_constant[0].double()
    leave = (off.abs() < OFF) | (torch.exp(2 * log_scale) < (1 + ABOVE_EPS) * site.eps)  # s^2 is the variance plus eps.
    return torch.exp(-off).masked_fill(leave, 1.0)


def _written(projection: nn.Module, x: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    written = linear_weight(projection).double() @ x
    bias = getattr(projection, "bias", None)
    return written if bias is None else written + bias.double()


def _reads(
    model: PreTrainedModel, projections: Sequence[str], blocks: Dataset
) -> dict[str, tuple[Float[Tensor, "block in"], Float[Tensor, "in in"]]]:
    """What each projection reads at the first position of every block, and the mean of x x' elsewhere, in float64."""
    first: dict[str, list[Tensor]] = {name: [] for name in projections}
    moments: dict[str, Tensor] = {}
    count = 0
    with recorded(model, projections) as record, evaluating(model):
        for ids in batches(blocks, BATCH, model.device):
            model(input_ids=ids, use_cache=False)
            count += ids[:, 1:].numel()
            for name in projections:
                read = record[name][0].view(*ids.shape, -1)
                first[name].append(read[:, 0].double())
                rest = read[:, 1:].flatten(0, 1).float()
                moments[name] = moments.get(name, 0.0) + (rest.T @ rest).double()
    return {name: (torch.cat(first[name]), moments[name] / count) for name in projections}
