"""LoRA: where it goes, how it begins, what scales it, and its dropout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import tree
from trainjax.peft import Lora, lora

KEY = jax.random.key(0)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
MATRICES = [f"layers/attention/{name}/kernel" for name in ("key", "output", "query", "value")]
MATRICES += [f"layers/mlp/{name}/kernel" for name in ("down", "gate", "up")]


def targets(adapter) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[0] for name in tree.flatten(adapter)))


def stack_of(method, name: str, key=None) -> Lora:
    """The attached weight of a model of two layers with one 8 x 6 matrix each, B random."""
    params = tree.unflatten({name: jnp.zeros((2, 8, 6))})
    return tree.flatten(method.attach(params, helpers.trained(method, params), key))[name]


@jax.jit
def times(x, stack: Lora):
    """`x` times each matrix of a stack."""
    return jax.vmap(lambda w: x @ w)(stack)


def test_it_begins_as_the_base_exactly():
    model, method = helpers.tiny(), lora(rank=4, target="kernel")
    adapter = method.init(KEY, model.params)
    expected = model.logits(TOKENS)
    attached = model.with_params(method.attach(model.params, adapter)).logits(TOKENS)
    np.testing.assert_array_equal(attached, expected)
    jax.tree.map(np.testing.assert_array_equal, method.merge(model.params, adapter), model.params)


def test_a_begins_uniform_within_one_over_root_of_the_inputs_and_b_at_zero():
    params = {"kernel": jnp.zeros((400, 100), jnp.bfloat16)}
    adapter = lora(rank=50, target="kernel").init(KEY, params)["kernel"]
    assert (adapter["a"].dtype, adapter["b"].dtype) == (jnp.float32, jnp.float32)
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(jnp.abs(adapter["a"]).max()) <= bound
    # A uniform draw's standard deviation is bound / sqrt(3); of 20000 draws within 1%.
    np.testing.assert_allclose(adapter["a"].std(), bound / math.sqrt(3), rtol=0.02)
    assert not adapter["b"].any()


def test_matrices_begin_differently_and_whatever_other_targets_there_are():
    params = helpers.tiny().params
    one = tree.flatten(lora(rank=2, target="query").init(KEY, params))
    all_of_them = tree.flatten(lora(rank=2).init(KEY, params))
    name = "layers/attention/query/kernel/a"
    np.testing.assert_array_equal(one[name], all_of_them[name])
    first, second = np.asarray(one[name])  # the layers
    assert np.all(first != second)
    assert np.all(np.asarray(one[name]) != all_of_them["layers/attention/output/kernel/a"])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r"^layers/", MATRICES),
        (r"query|head", ["head/kernel", "layers/attention/query/kernel"]),
        (r"mlp/(up|down)", ["layers/mlp/down/kernel", "layers/mlp/up/kernel"]),
    ],
)
def test_targets_are_the_matrices_that_the_regex_matches(target, expected):
    """Never norms, biases and embeddings."""
    params = contract.with_biases(helpers.tiny().params)
    adapter = lora(rank=2, target=target).init(KEY, params)
    assert targets(adapter) == expected
    attached = lora(rank=2, target=target).attach(params, adapter)
    found = [name for name, leaf in tree.flatten(attached).items() if isinstance(leaf, Lora)]
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, 12 / 4), ({"rslora": True}, 12 / 2)], ids=["plain", "rslora"]
)
def test_update_is_a_b_times_alpha_over_the_rank_or_its_root(settings, scale):
    method = lora(rank=4, alpha=12.0, target="kernel", **settings)
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((8, 6), (8, 4), (4, 6)))
    params, adapter = (
        {"kernel": jnp.asarray(w)},
        {"kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}},
    )
    expected = w.astype(np.float64) + scale * a.astype(np.float64) @ b
    np.testing.assert_allclose(method.merge(params, adapter)["kernel"], expected, rtol=0, atol=1e-5)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    found = jnp.asarray(x) @ method.attach(params, adapter)["kernel"]
    np.testing.assert_allclose(found, x @ expected, rtol=0, atol=1e-4)


def test_patterns_give_a_layer_its_own_rank_and_alpha_and_the_first_match_wins():
    method = lora(
        rank=2,
        alpha=8.0,
        target="kernel",
        rank_pattern={"layers/1/.*up": 4, "up": 1},
        alpha_pattern={"layers/0": 3.0},
    )
    names = "layers/mlp/up/kernel", "layers/mlp/gate/kernel"
    params = tree.unflatten({name: jnp.zeros((2, 8, 6)) for name in names})
    attached = tree.flatten(method.attach(params, method.init(KEY, params)))
    up, gate = (attached[name] for name in names)
    np.testing.assert_array_equal(up.scale, [3.0 / 1, 8.0 / 4])
    used = np.asarray((up.a != 0).any(axis=1))
    np.testing.assert_array_equal(used, [[True, False, False, False], [True] * 4])
    np.testing.assert_array_equal(gate.scale, [1.5, 4.0])


def test_ranks_above_a_smaller_one_stay_zero_in_training():
    """Of what pads the stack neither factor gets a gradient."""
    stack = stack_of(lora(rank=1, target="up", rank_pattern={"layers/1": 3}), "layers/up/kernel")
    total = lambda stack: jnp.sum(times(jnp.ones((3, 8)), stack) ** 2)  # noqa: E731
    gradient = jax.device_get(jax.jit(jax.grad(total))(stack))
    assert not gradient.a[0, :, 1:].any()
    assert not gradient.b[0, 1:].any()
    assert gradient.a[1].all()
    assert gradient.b[1].all()


def test_merging_keeps_the_dtype_and_leaves_other_weights_alone():
    params = tree.cast(helpers.tiny().params, jnp.bfloat16)
    method = lora(rank=2, target="query")
    merged = method.merge(params, helpers.trained(method, params))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    changed = [
        name
        for name, leaf in tree.flatten(merged).items()
        if leaf is not tree.flatten(params)[name]
    ]
    assert changed == ["layers/attention/query/kernel"]


def test_equal_settings_are_one_method():
    """So that jit sees no new program in a method that is made anew."""
    assert lora(rank=2, alpha_pattern={"up": 1.0}) == lora(rank=2, alpha_pattern={"up": 1.0})
    assert lora(rank=2) != lora(rank=3)


def test_the_contract_sees_a_program_that_is_compiled_and_none_that_was():
    double = jax.jit(lambda x: x + x)
    for expected in (1, 0):
        with contract.compilations() as compiled:
            double(np.float32(2.0))
        assert len(compiled) == expected


# --- dropout ------------------------------------------------------------------------------------


def identity_update(dropout: float, key) -> Lora:
    """`x @ weight` is `dropout(x)` of 64 numbers."""
    return Lora(jnp.zeros((64, 64)), jnp.eye(64), jnp.eye(64), jnp.float32(1.0), key, dropout)


def test_dropout_zeroes_its_share_of_the_updates_inputs_and_scales_the_rest():
    x = jnp.ones((500, 64))
    found = x @ identity_update(0.25, KEY)
    np.testing.assert_allclose(np.unique(found), [0.0, 1 / 0.75], rtol=1e-6)
    # 32000 draws: the share's standard deviation is sqrt(0.25 * 0.75 / 32000) = 0.0024.
    np.testing.assert_allclose((found == 0).mean(), 0.25, atol=0.012)


def test_dropout_leaves_the_frozen_product_alone():
    w = jnp.eye(64)
    update = Lora(w, jnp.zeros((64, 2)), jnp.zeros((2, 64)), jnp.float32(1.0), KEY, 0.9)
    np.testing.assert_array_equal(jnp.ones((5, 64)) @ update, jnp.ones((5, 64)))


@pytest.mark.parametrize(
    ("dropout", "key", "random"), [(0.5, KEY, True), (0.5, None, False), (0.0, KEY, False)]
)
def test_dropout_is_random_with_a_key_only(dropout, key, random):
    x = jnp.ones((3, 8))
    method = lora(rank=2, target="up", dropout=dropout)
    plain = times(x, stack_of(lora(rank=2, target="up"), "layers/up/kernel"))
    found = times(x, stack_of(method, "layers/up/kernel", key))
    assert np.any(np.asarray(found) != np.asarray(plain)) == random


def test_layers_and_matrices_drop_apart():
    method = lora(rank=2, target="kernel", dropout=0.5)
    up = stack_of(method, "layers/mlp/up/kernel", KEY)
    gate = stack_of(method, "layers/mlp/gate/kernel", KEY)
    keys = {tuple(data) for w in (up, gate) for data in jax.random.key_data(w.key).tolist()}
    assert len(keys) == 4


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 for layers/attention/key/kernel: a rank is at least 1"),
        (
            {"rank": 17},
            "rank=17 is above the sides of layers/attention/key/kernel, 32 x 16; at most 16",
        ),
        ({"rank": 2, "rank_pattern": {"up": 0}}, "rank=0 for layers/mlp/up/kernel"),
        ({"rank": 2, "rank_pattern": {"layers/1/mlp/up": 33}}, "rank=33 is above .*mlp/up/kernel"),
        ({"target": "qeury"}, "matches 'qeury'; the names are .*layers/attention/query/kernel"),
        ({"target": "norm"}, "matches 'norm'; the names are embed/embedding, head/kernel, "),
        ({"target": "("}, r"'\(' is not a regular expression"),
        ({"rank": 2, "rank_pattern": {"(": 3}}, r"'\(' is not a regular expression"),
        (
            {"rank": 2, "target": "mlp", "rank_pattern": {"layers/0/mlp/upp": 4}},
            "rank_pattern: 'layers/0/mlp/upp' .* layers/mlp/up/kernel, .* in layers/0/mlp/down/kernel",
        ),
        (
            {"rank": 2, "target": "mlp", "alpha_pattern": {"attention": 1.0}},
            "alpha_pattern: 'attention' matches no matrix",
        ),
        ({"rank": 2, "alpha_pattern": {"[": 3.0}}, r"'\[' is not a regular expression"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 is not a probability"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    params = helpers.tiny().params

    def use():
        method = lora(**settings)
        method.attach(params, method.init(KEY, params))

    with pytest.raises(ValueError, match=message):
        use()


def test_an_adapter_of_other_names_is_refused():
    model, method = helpers.tiny(), lora(rank=2, target="query")
    adapter = {"layers": {"mixer": {"kernel": {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 4))}}}}
    for use in (method.attach, method.merge):
        with pytest.raises(
            ValueError, match="the adapter has 'layers/mixer/kernel', which the model"
        ):
            use(model.params, adapter)


class TestContract(contract.Contract):
    methods = {
        "plain": lora(rank=2, alpha=4.0),
        "rslora on some": lora(rank=3, target="query|up", rslora=True),
    }
