"""What the backward pass keeps changes its memory, and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax import losses
from trainjax.policies import policy
from trainjax.recipes._common import REMAT


def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 60, 48).astype(np.int32) for _ in range(4)]
    return helpers.packed(rows, [[n] for n in range(4)], 48)


@pytest.mark.parametrize("name", [name for name in REMAT if name != "full"])
def test_gradients_are_the_same_whatever_is_kept(name):
    results = []
    for kept in (REMAT["full"], REMAT[name]):
        model = helpers.tiny(remat=kept)
        results.append(helpers.loss_and_gradients(losses.sft(policy(model)), model.params, batch()))
    (value, grads), (again, same) = results
    assert again == pytest.approx(value, rel=1e-6)
    helpers.assert_close(same, grads, 1e-5)


def test_what_is_offloaded_is_kept_in_the_hosts_memory():
    rows = jax.tree.map(jnp.asarray, batch())

    def program(kept):
        model = helpers.tiny(remat=REMAT[kept])
        gradient = jax.grad(lambda params, loss: loss(params, rows)[0])
        return str(jax.make_jaxpr(gradient)(model.params, losses.sft(policy(model))))

    assert "<host>" in program("offloaded")
    assert "<host>" not in program("projections")
