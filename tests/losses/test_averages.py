"""Weights that make a loss an average: against verl, in parts of a batch, in packed rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollouts import (
    VERL,
    arrays,
    random_tokens,
)
from trainjax.losses import averages

AVERAGES: dict[str, Callable[..., Any]] = {
    "token-mean": averages.token_mean,
    "seq-mean-token-sum": averages.sequence_mean_token_sum,
    "seq-mean-token-mean": averages.sequence_mean_token_mean,
    "seq-mean-token-sum-norm": functools.partial(averages.constant_length, length=VERL["length"]),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_make_the_averages_of_verl(name):
    """A sequence without any action, as there is one, is not counted."""
    for case in VERL["rollouts"]:
        data, mask = arrays(case["data"], np.float32), np.asarray(case["data"]["mask"], bool)
        loss = np.sum(AVERAGES[name](jnp.asarray(mask)) * data["advantages"])
        np.testing.assert_allclose(loss, case["averages"][name], rtol=1e-5)


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_of_parts_given_the_totals_are_those_of_the_whole(name):
    mask = jnp.asarray(random_tokens(0, batch=6)["mask"])
    total = np.sum(mask) if name == "token-mean" else np.sum(np.any(mask, axis=1))
    parts = [AVERAGES[name](mask[i : i + 2], **{TOTALS[name]: total}) for i in (0, 2, 4)]
    np.testing.assert_allclose(jnp.concatenate(parts), AVERAGES[name](mask), rtol=1e-6)


TOTALS = dict.fromkeys(AVERAGES, "num_sequences") | {"token-mean": "num_tokens"}


@pytest.mark.parametrize("name", AVERAGES)
def test_weights_of_a_batch_without_actions_are_zero(name):
    assert not np.any(AVERAGES[name](jnp.zeros((2, 3), bool)))


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "token-mean"])
def test_weights_are_those_of_sequences_also_in_packed_rows(name):
    apart = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0]], bool)
    packed = jnp.concatenate([apart[:2], apart[2:]], axis=1)
    segments = jnp.asarray([[1] * 4 + [2] * 4] * 2)
    ours = AVERAGES[name](packed, segments=segments)
    np.testing.assert_allclose(
        ours, jnp.concatenate(jnp.split(AVERAGES[name](apart), 2), axis=1), rtol=1e-6
    )
