"""Evaluations: how good a model's answers are, and what a sequence of tasks has left of them."""

from trainjax.evals.exact_match import ExactMatch, exact_match
from trainjax.evals.forgetting import Forgetting, forgetting
from trainjax.evals.rewards import Comparisons, comparisons, scores

__all__ = [
    "Comparisons",
    "ExactMatch",
    "Forgetting",
    "comparisons",
    "exact_match",
    "forgetting",
    "scores",
]
