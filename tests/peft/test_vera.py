"""VeRA: the shared projections, the formula, its files beside PEFT's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract, library
from tests.peft.fake_quant import dequantised, quantised
from trainjax import tree
from trainjax.peft.vera import Vera, vera
from trainjax.types import PeftFiles

KEY = jax.random.key(0)
UP = "layers/mlp/up/kernel"


def test_one_pair_of_projections_serves_all_matrices_and_only_vectors_train():
    """Of the tiny model: 48 inputs of `down` and 48 outputs of `up` are the widest."""
    adapter = vera(rank=70).init(KEY, helpers.tiny().params)
    shared = tree.thawed(adapter["projections"])
    assert {name: x.shape for name, x in shared.items()} == {"a": (48, 70), "b": (70, 48)}
    trained = tree.flatten(tree.trainable(adapter))
    assert {name.rpartition("/")[2] for name in trained} == {"d", "b"}
    assert trained[f"{UP}/d"].shape == (2, 70)
    np.testing.assert_array_equal(trained[f"{UP}/d"], np.full((2, 70), 0.1, np.float32))
    assert not trained[f"{UP}/b"].any()


def test_projections_are_uniform_with_variance_two_over_their_inputs():
    params = {"kernel": jnp.zeros((400, 300))}
    shared = tree.thawed(vera(rank=100, target="kernel").init(KEY, params)["projections"])
    for name, inputs in (("a", 400), ("b", 100)):
        bound = (6 / inputs) ** 0.5
        assert 0.99 * bound < float(jnp.abs(shared[name]).max()) <= bound
        # 30000 draws or more: the standard deviation is known within 1%.
        np.testing.assert_allclose(np.std(shared[name]), (2 / inputs) ** 0.5, rtol=0.02)


def test_the_update_is_a_d_b_b_of_the_first_rows_and_columns():
    method = vera(rank=5, target="up|down")
    params = helpers.tiny().params
    adapter = contract.moved(method.init(KEY, params))
    named = tree.flatten(tree.thawed(adapter))
    d, b, a, p = (
        np.asarray(named[name], np.float64)
        for name in (f"{UP}/d", f"{UP}/b", "projections/a", "projections/b")
    )
    w = np.asarray(tree.flatten(params)[UP], np.float64)
    merged = tree.flatten(method.merge(params, adapter))[UP]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
    stack = tree.flatten(method.attach(params, adapter))[UP]
    for layer in (0, 1):
        expected = w[layer] + a[:32] @ np.diag(d[layer]) @ p @ np.diag(b[layer])
        np.testing.assert_allclose(merged[layer], expected, rtol=0, atol=1e-5)
        found = jax.jit(lambda x, stack, n=layer: x @ jax.tree.map(lambda w: w[n], stack))(x, stack)
        np.testing.assert_allclose(found, np.asarray(x, np.float64) @ expected, rtol=0, atol=1e-4)


def test_the_gradient_makes_nothing_of_the_projections_size():
    weight = Vera(
        *(jnp.ones(shape) for shape in ((8, 6), (9, 5), (5, 7), (5,), (6,))),
    )

    def total(d, b):
        return jnp.sum(
            (jnp.ones((3, 8)) @ Vera(weight.w, weight.shared_a, weight.shared_b, d, b)) ** 2
        )

    program = jax.make_jaxpr(jax.grad(total, (0, 1)))(weight.d, weight.b)
    made = helpers.shapes_in(program.jaxpr)
    assert (3, 5) in made
    # Slices of the projections are the only arrays of such shapes: no product, no gradient.
    products = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert {e.outvars[0].aval.shape for e in products} <= {(3, 6), (3, 5)}


def test_matrices_of_as_many_layers_see_one_array():
    """Attached outside a program too: seven matrices do not hold seven copies."""
    params = helpers.tiny().params
    method = vera(rank=5)
    attached = tree.flatten(method.attach(params, method.init(KEY, params)))
    stacks = [leaf for leaf in attached.values() if isinstance(leaf, Vera)]
    assert len(stacks) == 7
    assert len({id(leaf.shared_a) for leaf in stacks}) == 1


def test_dropout_is_on_the_updates_input():
    x = jnp.ones((400, 8))
    ones = jnp.ones
    weight = Vera(jnp.eye(8), jnp.eye(8), jnp.eye(8), ones(8), ones(8), KEY, 0.25)
    np.testing.assert_allclose(np.unique(x @ weight), [1.0, 1 + 1 / 0.75], rtol=1e-6)


def test_over_a_quantised_base_it_is_the_update_over_the_dequantised_one():
    model, method = helpers.tiny(), vera(rank=4)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: a rank is at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"target": "qeury"}, "matches 'qeury'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        vera(**settings).init(KEY, helpers.tiny().params)


def exported(fields, tensors) -> PeftFiles:
    """Of an adapter on both `up`s; a tensor that is None is left out."""
    method = vera(rank=3, target="mlp/up")
    modules = {f"layers/{n}/mlp/up/kernel": f"model.layers.{n}.mlp.up_proj" for n in (0, 1)}
    found = method.export(method.init(KEY, helpers.tiny().params), modules)
    changed = {k: v for k, v in (found.tensors | tensors).items() if v is not None}
    return PeftFiles(found.fields | fields, changed)


FIRST = "model.layers.0.mlp.up_proj.vera_lambda"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"save_projection": False}, {"base_model.vera_A": None}, "save_projection=True"),
        ({"bias": "all"}, {}, "sets bias='all', which is not supported"),
        ({"r": 4}, {}, r"vera_A \(3, 32\) and vera_B \(48, 3\) do not fit r=4"),
        (
            {},
            {f"{FIRST}_d": np.ones(2, np.float32)},
            r"vera_lambda_d \(2,\) does not fit .* 3 numbers",
        ),
        (
            {},
            {f"{FIRST}_b": np.full(48, np.inf, np.float32)},
            "up_proj.vera_lambda_b holds NaN or inf",
        ),
        (
            {},
            {"base_model.vera_B": np.ones((40, 3), np.float32)},
            r"vera_B \(40, 3\) are narrower than",
        ),
        (
            {},
            {"model.norm.vera_lambda_d": np.ones(3, np.float32)},
            "holds 'model.norm.vera_lambda_d'",
        ),
    ],
    ids=["no projections", "field", "rank", "shape", "not finite", "narrow", "unknown"],
)
def test_files_that_cannot_be_are_refused_by_name(tmp_path, fields, tensors, message):
    model = helpers.tiny()
    tj.io.peft.write(tmp_path, exported(fields, tensors), model.fingerprint)
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(tmp_path, model)


class TestContract(contract.Contract):
    methods = {"plain": vera(rank=6)}


SETTINGS = [
    ("llama_grouped", {"r": 6, "target_modules": library.ALL}),
    ("qwen2", {"r": 20, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=["all", "one layer"])
class TestParity:
    def config(self, settings):
        import peft

        return peft.VeraConfig(task_type="CAUSAL_LM", save_projection=True, **settings)

    def test_it_is_the_same_function_in_peft_both_ways(self, tmp_path, family, settings):
        library.assert_same_both_ways(tmp_path, self.config(settings), family)

    def test_it_trains_as_in_peft(self, tmp_path, family, settings):
        library.assert_same_trace(tmp_path, self.config(settings), family=family)
