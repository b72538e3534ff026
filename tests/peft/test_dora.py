"""DoRA: its formula in float64, its norm's gradient, its dropout, its files."""

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
from trainjax.peft.dora import Dora, dora
from trainjax.types import Frozen, PeftFiles

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(7).standard_normal((5, 12)), jnp.float32)
X64 = np.asarray(X, np.float64)
UP = "layers/mlp/up/kernel"


def example(update: float = 0.5, columns: float = 1.0, **settings) -> Dora:
    """A matrix of 12 x 9 with a trained update; `columns` is the length of each column of the base."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 9))
    w *= columns / np.linalg.norm(w, axis=0)
    a, b = rng.standard_normal((12, 3)), update * rng.standard_normal((3, 9))
    norms = np.linalg.norm(w, axis=0)
    magnitude = rng.uniform(0.5, 2.0, 9)
    parts = (w, a, b, np.asarray(2.0), magnitude, norms)
    return Dora(*(jnp.asarray(part, jnp.float32) for part in parts), **settings)


@jax.jit
def product(x, weight):
    return x @ weight


def exact(weight: Dora) -> np.ndarray:
    """`m (w + s a b) / |w + s a b|` in float64."""
    w, a, b, scale, magnitude = (
        np.asarray(part, np.float64)
        for part in (weight.w, weight.a, weight.b, weight.scale, weight.magnitude)
    )
    total = w + scale * a @ b
    return magnitude * total / np.linalg.norm(total, axis=0)


@pytest.mark.parametrize("update", [1e-4, 0.5, 30.0])
def test_the_factored_norm_is_that_of_the_dense_sum(update):
    weight = example(update)
    np.testing.assert_allclose(product(X, weight), X64 @ exact(weight), rtol=0, atol=3e-6)
    np.testing.assert_allclose(weight.dense(), exact(weight), rtol=0, atol=1e-6)


def test_an_update_that_undoes_nine_tenths_of_a_column_keeps_its_digits():
    """The three terms cancel to a hundredth, so the norm has about two digits less than float32."""
    a, b = (
        np.linalg.qr(np.random.default_rng(3).standard_normal((12, 12)))[0][:, :9],
        -0.9 * np.eye(9),
    )
    w, ones = jnp.asarray(a, jnp.float32), jnp.ones(9)
    weight = Dora(w, w, jnp.asarray(b, jnp.float32), jnp.float32(1.0), ones, ones)
    np.testing.assert_allclose(product(X, weight), X64 @ exact(weight), rtol=0, atol=1e-4)


def test_in_bfloat16_the_norm_is_still_that_of_float32():
    weight = example(1e-3)
    narrow = product(X.astype(jnp.bfloat16), weight)
    assert narrow.dtype == jnp.bfloat16
    expected = np.asarray(X.astype(jnp.bfloat16), np.float64) @ exact(weight)
    # x @ w alone is rounded by 2^-8 of itself here, and its terms by as much.
    np.testing.assert_allclose(np.asarray(narrow, np.float64), expected, rtol=0, atol=0.03)


def test_a_magnitude_that_bfloat16_cannot_tell_from_its_start_still_counts():
    """In bfloat16 1.003 is 1, but 255 * 1.003 is 256 and not 255."""
    w = jnp.asarray(np.ones((255, 4)), jnp.bfloat16)
    norms = np.full(4, 255.0**0.5)
    parts = (np.zeros((255, 1)), np.zeros((1, 4)), np.asarray(1.0), 1.003 * norms, norms)
    weight = Dora(w, *(jnp.asarray(part, jnp.float32) for part in parts))
    found = product(jnp.ones((1, 255), jnp.bfloat16), weight)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full((1, 4), 256.0))


def test_the_norm_is_a_constant_to_the_gradient():
    """Compared with the gradient of the formula in which the norm is a number."""
    weight = example()
    total = np.asarray(weight.w, np.float64) + 2.0 * np.asarray(weight.a, np.float64) @ weight.b
    factor = np.asarray(weight.magnitude) / np.linalg.norm(total, axis=0)
    grads = jax.jit(jax.grad(lambda weight: jnp.sum(X @ weight)))(weight)
    ones = np.ones((5, 9))
    np.testing.assert_allclose(
        grads.a, 2.0 * X64.T @ (ones * factor) @ weight.b.T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        grads.b, 2.0 * (X64 @ weight.a).T @ (ones * factor), rtol=1e-4, atol=1e-4
    )
    expected = (X64 @ total).sum(0) / np.linalg.norm(total, axis=0)
    np.testing.assert_allclose(grads.magnitude, expected, rtol=1e-4, atol=1e-4)


def test_a_column_of_zeros_stays_one_and_its_gradient_is_finite():
    params = {"kernel": X.T.at[:, 2].set(0.0)}
    method = dora(rank=2, target="kernel")
    adapter = method.init(KEY, params)

    def total(adapter):
        return jnp.sum(jnp.ones((1, 12)) @ method.attach(params, adapter)["kernel"])

    np.testing.assert_array_equal(method.merge(params, adapter)["kernel"][:, 2], 0.0)
    gradient = jax.jit(jax.grad(lambda trained: total(tree.with_trained(adapter, trained))))
    grads = gradient(tree.trainable(adapter))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_magnitudes_begin_as_the_lengths_of_the_columns():
    params = helpers.tiny().params
    adapter = tree.flatten(dora(rank=2, target="up").init(KEY, params))
    w = np.asarray(tree.flatten(params)[UP], np.float64)
    np.testing.assert_allclose(adapter[f"{UP}/magnitude"], np.linalg.norm(w, axis=-2), rtol=1e-6)
    frozen = tree.flatten(tree.thawed(dora(rank=2, target="up").init(KEY, params)))
    np.testing.assert_array_equal(frozen[f"{UP}/norms"], adapter[f"{UP}/magnitude"])


def test_dropout_is_on_the_update_and_on_what_is_added_to_the_bases_product():
    """PEFT's order: `x W + (k - 1) d(x) W + k s d(x) A B` with `k = m / norm` and `d` one draw."""
    weight = example(key=KEY, dropout=0.5)
    kept = np.asarray(jax.random.bernoulli(KEY, 0.5, X.shape))
    dropped = np.where(kept, X64 * 2, 0).astype(np.float64)
    w = np.asarray(weight.w, np.float64)
    update = 2.0 * np.asarray(weight.a, np.float64) @ weight.b
    factor = np.asarray(weight.magnitude) / np.linalg.norm(w + update, axis=0)
    expected = X64 @ w + (factor - 1) * (dropped @ w) + factor * (dropped @ update)
    np.testing.assert_allclose(product(X, weight), expected, rtol=0, atol=3e-5)


def test_over_a_quantised_base_it_is_dora_over_the_dequantised_one():
    model, method = helpers.tiny(), dora(rank=2)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


def test_no_array_of_a_matrixs_size_is_made_beside_the_base():
    weight = example()
    program = jax.make_jaxpr(lambda x, weight: x @ weight)(X, weight)
    assert (12, 9) not in helpers.shapes_in(program.jaxpr)


def files(tmp_path, **changes) -> PeftFiles:
    """Of an adapter of the tiny model, with some tensors of the first layer's `up` changed."""
    model, method = helpers.tiny(), dora(rank=2, target="mlp/up")
    modules = {f"layers/{n}/mlp/up/kernel": f"model.layers.{n}.mlp.up_proj" for n in (0, 1)}
    found = method.export(method.init(KEY, model.params), modules)
    tensors = dict(found.tensors)
    name = "model.layers.0.mlp.up_proj.lora_magnitude_vector"
    if "magnitude" in changes:
        tensors[name] = changes["magnitude"]
        if tensors[name] is None:
            del tensors[name]
    return PeftFiles(found.fields | changes.get("fields", {}), tensors | changes.get("more", {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitude": None}, "model.layers.0.mlp.up_proj has no lora_magnitude_vector"),
        (
            {"magnitude": np.ones(7, np.float32)},
            r"lora_magnitude_vector \(7,\) does not fit .* 48 out",
        ),
        (
            {"magnitude": np.full(48, np.nan, np.float32)},
            "up_proj: lora_magnitude_vector holds NaN",
        ),
        (
            {"fields": {"alora_invocation_tokens": [1]}},
            r"sets alora_invocation_tokens=\[1\], which",
        ),
        ({"more": {"model.norm.lora_magnitude_vector": np.ones(3)}}, "holds 'model.norm.lora_mag"),
    ],
    ids=["missing", "shape", "nan", "field", "unknown"],
)
def test_files_that_cannot_be_are_refused_by_name(tmp_path, changes, message):
    model = helpers.tiny()
    tj.io.peft.write(tmp_path, files(tmp_path, **changes), model.fingerprint)
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(tmp_path, model)


def test_settings_are_checked_as_loras_are():
    with pytest.raises(ValueError, match=r"dropout=1.5 is not a probability"):
        dora(dropout=1.5)
    with pytest.raises(ValueError, match="rank=17 is above the sides"):
        dora(rank=17).init(KEY, helpers.tiny().params)


def test_the_bases_norms_are_frozen():
    adapter = dora(rank=2, target="up").init(KEY, helpers.tiny().params)
    assert isinstance(adapter["layers"]["mlp"]["up"]["kernel"]["norms"], Frozen)


class TestContract(contract.Contract):
    methods = {
        "plain": dora(rank=2, alpha=4.0),
        "dropout on some": dora(rank=3, target="query|up", rslora=True, dropout=0.1),
    }
    start_tolerance = 1e-5


SETTINGS = [
    ("llama_biased_llama3", {"r": 3, "lora_alpha": 6, "target_modules": library.ALL}),
    (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "layers_to_transform": [1],
        },
    ),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=["biased", "one layer"])
class TestParity:
    def config(self, settings):
        import peft

        return peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **settings)

    def test_it_is_the_same_function_in_peft_both_ways(self, tmp_path, family, settings):
        library.assert_same_both_ways(tmp_path, self.config(settings), family)

    def test_it_trains_as_in_peft(self, tmp_path, family, settings):
        if "layers_to_transform" in settings:
            settings = settings | {"layers_to_transform": None}
        library.assert_same_trace(tmp_path, self.config(settings), family=family)
