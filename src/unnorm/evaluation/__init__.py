"""Loss, fidelity and benchmarks: what an LN-free model costs, and how close it stays to the original."""

from unnorm.evaluation.corpora import EVALUATION_TOKENS, with_documents
from unnorm.evaluation.results import Evaluation, Results, Score
from unnorm.evaluation.run import evaluate
from unnorm.evaluation.summary import evaluate_model

__all__ = [
    "EVALUATION_TOKENS",
    "Evaluation",
    "Results",
    "Score",
    "evaluate",
    "evaluate_model",
    "with_documents",
]
