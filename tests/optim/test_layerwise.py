"""Learning rates by depth: what each layer's updates are multiplied by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import tree
from trainjax.optim.layerwise import layerwise_decay

PARAMS = {
    "embed": {"embedding": jnp.ones((5, 2))},
    "layers": {
        "norm": {"scale": jnp.ones((3, 2))},
        "up": {"kernel": {"a": jnp.ones((3, 2, 4)), "b": jnp.ones((3, 4, 2))}},
    },
    "norm": {"scale": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 5))},
}


def scaled(params, *args, **settings) -> dict[str, np.ndarray]:
    tx = layerwise_decay(*args, **settings)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    return tree.flatten(jax.device_get(updates))


@pytest.mark.parametrize("above", ["", "body/"], ids=["a model", "a scorer"])
def test_each_layer_steps_by_a_factor_less_than_the_one_above_it(above):
    params = {above.strip("/"): PARAMS} if above else PARAMS
    found = scaled(params, 0.5, 3)
    for name, update in found.items():
        kind = name.removeprefix(above).split("/")[0]
        by_layer = {"layers": [1 / 8, 1 / 4, 1 / 2], "embed": [1 / 16]}.get(kind, [1])
        expected = np.reshape(by_layer, (-1, *[1] * (update.ndim - 1))) * np.ones_like(update)
        np.testing.assert_array_equal(update, expected, name)


def test_an_adapter_of_some_layers_says_which():
    params = {"layers": {"up": jnp.ones((2, 4))}, "norm": jnp.ones(2)}
    found = scaled(params, 0.5, 10, layers={"layers/up": (7, 9), "norm": None})
    np.testing.assert_array_equal(found["layers/up"][:, 0], [1 / 8, 1 / 2])
    np.testing.assert_array_equal(found["norm"], 1)


def test_what_is_frozen_and_the_dtype_stay():
    tx = layerwise_decay(0.5, 3)
    updates = {"layers": {"a": jnp.ones((3, 2), jnp.bfloat16), "b": None}}
    found, _ = tx.update(updates, tx.init(updates))
    assert found["layers"]["a"].dtype == jnp.bfloat16
    assert found["layers"]["b"] is None


def test_last_in_a_chain_it_scales_the_steps_of_adam():
    tx = optax.chain(optax.adam(1.0), layerwise_decay(0.1, 3))
    with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
        updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(PARAMS)
    np.testing.assert_allclose(
        updates["layers"]["norm"]["scale"][:, 0], [-1e-3, -1e-2, -1e-1], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.0, 3), "decay=0.0 is a factor from one layer to the one below"),
        ((1.5, 3), "decay=1.5 is a factor"),
        ((0.5, 4), "layers/norm/scale has 3 layers, and the learning rates are of 4"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        scaled(PARAMS, *settings)
