"""Bottleneck adapters: what they compute and after what, how they begin, and that they do not merge."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import tree
from trainjax.peft.bottleneck import PFEIFFER, bottleneck, from_peft

KEY = jax.random.key(0)
BIASED = {"attention_bias": True, "mlp_bias": True}

ERF = np.vectorize(math.erf)
NONLINEAR = {
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("activation", NONLINEAR)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_adds_a_small_network_of_the_layers_output_bias_included(activation, with_bias):
    """The formula in float64 by numpy."""
    rng = np.random.default_rng(0)
    shapes = {"down": (6, 2), "down_bias": (2,), "up": (2, 6), "up_bias": (6,)}
    parts = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    w, bias, x = (rng.standard_normal(shape) for shape in ((8, 6), (6,), (5, 8)))
    y = x @ w + bias * with_bias
    inner = NONLINEAR[activation](y @ parts["down"] + parts["down_bias"])
    expected = y + inner @ parts["up"] + parts["up_bias"]
    narrow = lambda t: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), t)  # noqa: E731
    layer = narrow({"kernel": w} | ({"bias": bias} if with_bias else {}))
    method = bottleneck(2, "out", activation=activation)
    found = method.attach({"out": layer}, {"out": {"kernel": narrow(parts)}})["out"]
    assert not np.any(found.get("bias", 0))
    np.testing.assert_allclose(narrow(x) @ found["kernel"], expected, rtol=0, atol=1e-4)


def test_it_begins_with_a_uniform_projection_and_zeros():
    params = {"out": {"kernel": jnp.zeros((3, 400), jnp.bfloat16)}}
    parts = bottleneck(50, "out").init(KEY, params)["out"]["kernel"]
    assert {name: leaf.shape for name, leaf in parts.items()} == {
        "down": (400, 50),
        "down_bias": (50,),
        "up": (50, 400),
        "up_bias": (400,),
    }
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(jnp.abs(parts["down"]).max()) <= bound
    assert not any(parts[name].any() for name in ("down_bias", "up", "up_bias"))


def test_the_two_papers_differ_in_where():
    params = helpers.tiny().params
    both, one = (
        {name.rpartition("/")[0] for name in tree.flatten(method.init(KEY, params))}
        for method in (bottleneck(4), bottleneck(4, PFEIFFER))
    )
    assert both == {"layers/attention/output/kernel", "layers/mlp/down/kernel"}
    assert one == {"layers/mlp/down/kernel"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size=0: the inner layer has at least 1 unit"),
        ({"activation": "swish"}, "activation='swish' is not one of gelu, relu, silu"),
        ({"target": "dwon"}, "matches 'dwon'; the names are .*layers/mlp/down/kernel"),
        ({"target": "head|down"}, "the output head is a matrix"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        bottleneck(**settings).init(KEY, helpers.tiny().params)


def test_files_of_another_model_do_not_fit():
    method, params = bottleneck(4), helpers.tiny().params
    files = method.export(method.init(KEY, params), {})
    narrower = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)[..., :24]), params)
    with pytest.raises(ValueError, match=r"has the shape .*this model's has .*another model"):
        from_peft(files, {}, narrower)


class TestContract(contract.Contract):
    methods = {"houlsby": bottleneck(4), "pfeiffer": bottleneck(3, PFEIFFER, activation="relu")}
    merges = False
    settings = BIASED
