"""Evaluations: how good a model's answers are."""

from trainjax.evals.exact_match import ExactMatch, exact_match

__all__ = ["ExactMatch", "exact_match"]
