"""How each recipe optimizes: its loss, its weights, its optimizer's settings."""

from dataclasses import dataclass

from unnorm.losses import Penalty
from unnorm.schedule import Recipe


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimizer that belong to a recipe.

    Attributes:
        least_lr: share of the peak learning rate at the end of the cosine; 0 stands for a straight line to zero.
        warmup: share of the steps with rising learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        distil: minimize KL to the teacher's logits; else next-token loss.
        label_weight: weight of the next-token loss beside KL.
        penalty: what else is minimized at the final norm; see `scale_penalty`.
        penalty_weight: its weight.
        read_weight: weight of `read_mismatch`, averaged over all sites; it falls to 0 over the first `READS_SHARE`.
        massive_even_weight: weight of `massive_unevenness`, averaged over all bounded sites. It brings massive
            activations, once scaled down, to the constant scale.
        even_weight: weight of `unevenness`, averaged over all bounded sites, times alpha^4: while much is still held
            down it would only stand in the way. Once all are removed KL says the same of ordinary tokens, and those
            alone count that are beyond `RUNAWAY`, first tokens among them (`first_token_losses`).
    """

    least_lr: float
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    distil: bool
    label_weight: float = 0.0
    penalty: Penalty | None = None
    penalty_weight: float = 0.0
    read_weight: float = 0.0
    massive_even_weight: float = 0.0
    even_weight: float = 0.0


OPTIMIZATION: dict[Recipe, Optimization] = {
    "taper": Optimization(
        least_lr=0.0,
        warmup=0.05,
        weight_decay=0.0,
        betas=(0.9, 0.98),
        distil=True,
        label_weight=0.05,
        read_weight=10.0,
        massive_even_weight=10.0,
        even_weight=1000.0,
    ),
    # arXiv 2409.13710 and 2507.02559: weight decay 0.01, 20 of 300 steps of warm-up, a cosine to half the peak.
    "sequential": Optimization(
        least_lr=0.5,
        warmup=20 / 300,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        distil=False,
    ),
    "sequential-aux": Optimization(
        least_lr=0.5,
        warmup=20 / 300,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        distil=False,
        penalty="spread",
        penalty_weight=0.1,  # That of 2507.02559's published configuration.
    ),
    "tapernorm": Optimization(
        least_lr=0.1,
        warmup=0.05,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        distil=False,
        penalty="target",
        penalty_weight=0.1,
    ),
}
