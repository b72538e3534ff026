"""PiSSA: its start, the residual, and its files beside PEFT's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract, library
from tests.peft.fake_quant import dequantised, quantised
from trainjax import tree
from trainjax.peft import Lora, lora
from trainjax.peft.pissa import pissa, residual

KEY = jax.random.key(0)
UP = "layers/mlp/up/kernel"


def parts(adapter, name: str = UP) -> dict[str, np.ndarray]:
    """Of one matrix, frozen ones too."""
    named = tree.flatten(tree.thawed(adapter))
    return {part: np.asarray(named[f"{name}/{part}"]) for part in ("a", "b", "start_a", "start_b")}


@pytest.mark.parametrize(
    ("settings", "scale"), [({"alpha": 6.0}, 2.0), ({"alpha": 6.0, "rslora": True}, 6 / 3**0.5)]
)
def test_the_start_is_the_best_approximation_of_its_rank(settings, scale):
    """Numpy's decomposition in float64; the factors share each singular value and the scale evenly."""
    params = helpers.tiny().params
    found = parts(pissa(rank=3, target="up", **settings).init(KEY, params))
    for layer, w in enumerate(np.asarray(tree.flatten(params)[UP], np.float64)):
        u, s, v = np.linalg.svd(w, full_matrices=False)
        product = found["start_a"][layer] @ found["start_b"][layer]
        np.testing.assert_allclose(product, u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-5)
        roots = np.sqrt(s[:3] / scale)
        np.testing.assert_allclose(np.abs(found["a"][layer]), np.abs(u[:, :3] * roots), atol=1e-5)
        np.testing.assert_allclose(
            np.abs(found["b"][layer]), np.abs(roots[:, None] * v[:3]), atol=1e-5
        )


def test_more_passes_come_nearer_to_the_whole_decomposition():
    """Of a random matrix, whose singular values fall slowly."""
    params = {
        "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((60, 50)), jnp.float32)
    }

    def start(niter):
        found = parts(pissa(rank=4, target="kernel", niter=niter).init(KEY, params), "kernel")
        return found["start_a"] @ found["start_b"]

    errors = [np.linalg.norm(start(niter) - start(None)) for niter in (0, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.0
    assert errors[-1] < 1e-3
    np.testing.assert_array_equal(start(4), start(4))


def test_a_smaller_rank_of_a_stack_is_zeros():
    method = pissa(rank=3, target="up", rank_pattern={"layers/0": 1})
    found = parts(method.init(KEY, helpers.tiny().params))
    for part in ("a", "start_a"):
        np.testing.assert_array_equal(found[part][0].any(axis=0), [True, False, False])
    for part in ("b", "start_b"):
        np.testing.assert_array_equal(found[part][0].any(axis=1), [True, False, False])


def test_in_bfloat16_the_start_cancels_before_it_is_rounded():
    """Added one after the other the two products, each rounded, would leave other last digits."""
    rng = np.random.default_rng(0)
    decay = np.arange(1, 49) ** -0.5
    w = jnp.asarray(rng.standard_normal((64, 48)) * decay, jnp.bfloat16)
    params, method = {"kernel": w}, pissa(rank=8, alpha=16.0, target="kernel")
    x = jnp.asarray(rng.standard_normal((40, 64)), jnp.bfloat16)
    adapter = method.init(KEY, params)
    found = x @ method.attach(params, adapter)["kernel"]
    assert float(jnp.mean(found == x @ w)) > 0.95
    start = tree.thawed(adapter)["kernel"]
    rest = Lora(w, start["start_a"], -start["start_b"], jnp.float32(1.0))
    apart = x @ Lora(rest, start["a"], start["b"], jnp.float32(2.0))
    assert float(jnp.mean(apart == x @ w)) < 0.9


def test_dropout_leaves_the_residual_alone():
    """With all but no input dropped, and the factors at zero, what is left is the residual's product."""
    params = helpers.tiny().params
    method = pissa(rank=2, target="up", dropout=0.5)
    adapter = method.init(KEY, params)
    zeros = tree.with_trained(adapter, jax.tree.map(jnp.zeros_like, tree.trainable(adapter)))
    x = jnp.ones((3, 32))
    stack = tree.flatten(method.attach(params, zeros, KEY))[UP]
    expected = tree.flatten(residual(params, adapter)[0])[UP]
    found = x @ jax.tree.map(lambda leaf: leaf[1], stack)
    np.testing.assert_allclose(found, x @ expected[1], rtol=0, atol=1e-5)
    trained = tree.flatten(method.attach(params, contract.moved(adapter), KEY))[UP]
    other = tree.flatten(method.attach(params, contract.moved(adapter), jax.random.key(1)))[UP]
    one, two = (x @ jax.tree.map(lambda leaf: leaf[1], stack) for stack in (trained, other))
    assert bool(jnp.any(one != two))


def test_lora_over_the_residual_is_the_same_function():
    model, method = helpers.tiny(), pissa(rank=3, alpha=6.0)
    adapter = contract.moved(method.init(KEY, model.params))
    rest, factors = residual(model.params, adapter)
    attached = model.with_params(method.attach(model.params, adapter)).logits(contract.TOKENS)
    over = model.with_params(lora(rank=3, alpha=6.0).attach(rest, factors))
    helpers.assert_close({"logits": over.logits(contract.TOKENS)}, {"logits": attached}, 1e-5)
    w, u = (np.linalg.norm(tree.flatten(p)[UP], ord=2, axis=(-2, -1)) for p in (model.params, rest))
    assert (u < w).all()


def test_over_a_quantised_base_it_starts_from_the_dequantised_one():
    model, method = helpers.tiny(), pissa(rank=2)
    codes = quantised(model.params)
    first = method.init(KEY, codes)
    plain = method.init(KEY, dequantised(codes))
    helpers.assert_close(tree.flatten(tree.thawed(first)), tree.flatten(tree.thawed(plain)), 1e-5)
    adapter = contract.moved(first)
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)
    assert residual(codes, adapter)[0]["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("rslora", [False, True])
def test_its_files_are_lora_of_twice_the_rank_where_ranks_differ_too(tmp_path, rslora):
    model = helpers.tiny()
    patterns = {"rank_pattern": {"layers/1/.*up": 4}, "alpha_pattern": {"query": 5.0}}
    method = pissa(rank=2, alpha=3.0, rslora=rslora, **patterns)
    first = method.init(KEY, model.params)
    scaled = jax.tree.map(lambda leaf: 1.1 * leaf, tree.trainable(first))  # what pads stays zero
    adapter = tree.with_trained(first, scaled)
    tj.save_adapter(tmp_path, model, method, adapter)
    other, again = tj.load_adapter(tmp_path, model)
    assert tree.flatten(again)[f"{UP}/a"].shape == (2, 32, 8)
    expected = model.with_params(method.attach(model.params, adapter)).logits(contract.TOKENS)
    found = model.with_params(other.attach(model.params, again)).logits(contract.TOKENS)
    helpers.assert_close({"logits": found}, {"logits": expected}, 1e-5)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="niter=-1: a number of passes"):
        pissa(niter=-1)
    with pytest.raises(ValueError, match="rank=17 is above the sides"):
        pissa(rank=17).init(KEY, helpers.tiny().params)


def test_a_start_that_torch_drew_is_refused(tmp_path):
    model, method = helpers.tiny(), lora(rank=2, target="up")
    tj.save_adapter(tmp_path, model, method, method.init(KEY, model.params))
    found, _ = tj.io.peft.read(tmp_path)
    fields = found.fields | {"init_lora_weights": "pissa_niter_4"}
    tj.io.peft.write(tmp_path, found._replace(fields=fields), model.fingerprint)
    with pytest.raises(
        ValueError, match=r"init_lora_weights='pissa_niter_4': .* convert it to LoRA"
    ):
        tj.load_adapter(tmp_path, model)


class TestContract(contract.Contract):
    methods = {
        "plain": pissa(rank=2, alpha=4.0),
        "passes and dropout": pissa(rank=3, target="query|up", niter=16, dropout=0.1),
    }
    start_tolerance = 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
class TestParity:
    def config(self, **changes):
        import peft

        settings = {"r": 3, "lora_alpha": 6, "target_modules": library.ALL}
        return peft.LoraConfig(init_lora_weights="pissa", **settings | changes)

    def test_start_and_residual_are_those_of_peft(self, tmp_path):
        model = library.base(tmp_path / "base")
        theirs = library.wrapped(tmp_path / "base", self.config(), noise=None)
        method = pissa(rank=3, alpha=6.0)
        adapter = method.init(KEY, model.params)
        ours = parts(adapter)
        rest = tree.flatten(residual(model.params, adapter)[0])[UP]
        for number, layer in enumerate(theirs.base_model.model.model.layers):
            up = layer.mlp.up_proj
            a, b, w = (
                x.weight.detach().numpy().T
                for x in (up.lora_A["default"], up.lora_B["default"], up.base_layer)
            )
            np.testing.assert_allclose(np.abs(ours["a"][number]), np.abs(a), rtol=0, atol=1e-5)
            np.testing.assert_allclose(np.abs(ours["b"][number]), np.abs(b), rtol=0, atol=1e-5)
            np.testing.assert_allclose(rest[number], w, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "settings", [{}, {"layers_to_transform": [1]}], ids=["all", "one layer"]
    )
    def test_it_is_the_same_function_in_peft_both_ways(self, tmp_path, settings):
        # Each library takes off a start of its own, from another routine in float32.
        library.assert_same_both_ways(tmp_path, self.config(**settings), tolerance=3e-5)

    def test_it_trains_as_in_peft(self, tmp_path):
        library.assert_same_trace(tmp_path, self.config(), 1e-3)

    def test_it_trains_as_in_peft_from_its_own_start(self, tmp_path):
        """Signs of singular vectors turn gradients with them, and Adam's steps."""
        model = library.base(tmp_path / "base")
        theirs = library.wrapped(tmp_path / "base", self.config(), noise=None)
        method = pissa(rank=3, alpha=6.0)
        expected = library.trace(theirs, library.adamw(theirs, 1e-3))
        found, state = library.our_trace(
            model, method, method.init(KEY, model.params), optax.adamw(1e-3, weight_decay=0.0)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        tj.save_adapter(tmp_path / "ours", model, method, state.params)
        again = library.loaded(tmp_path / "base", tmp_path / "ours")
        library.assert_same(library.logits(again), library.our_logits(model, method, state.params))
