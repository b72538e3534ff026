"""LoRA-FA: what is frozen, what its files are, and its training beside PEFT's."""

from __future__ import annotations

import dataclasses

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
from trainjax.peft.lora_fa import lora_fa

KEY = jax.random.key(0)


def test_it_begins_as_lora_does_and_only_b_trains():
    params = helpers.tiny().params
    adapter = lora_fa(rank=2).init(KEY, params)
    names = tree.flatten(tree.trainable(adapter))
    assert names
    assert all(name.endswith("/b") for name in names)
    jax.tree.map(
        np.testing.assert_array_equal, tree.thawed(adapter), lora(rank=2).init(KEY, params)
    )


@pytest.mark.usefixtures("optimised_here")
def test_no_product_is_computed_for_a_gradient_of_a():
    """`x a` and `(x a)^T g` for b alone; for both also `g b^T` and its product with x."""
    weight = Lora(jnp.ones((64, 48)), jnp.ones((64, 3)), jnp.ones((3, 48)), jnp.float32(1.0))

    def products(loss, *args):
        program = jax.jit(jax.grad(loss, range(len(args)))).lower(*args).compile()
        return sum(line.count(" dot(") for line in program.as_text().splitlines())

    replace, x = dataclasses.replace, jnp.ones((16, 64))
    of_b = lambda b: jnp.sum((x @ replace(weight, b=b)) * 3.0)  # noqa: E731
    of_both = lambda a, b: jnp.sum((x @ replace(weight, a=a, b=b)) * 3.0)  # noqa: E731
    assert products(of_b, weight.b) == 2
    assert products(of_both, weight.a, weight.b) == 4


def test_its_files_are_loras_and_read_as_lora(tmp_path):
    model, method = helpers.tiny(), lora_fa(rank=2, alpha=5.0, target="up")
    adapter = contract.moved(method.init(KEY, model.params))
    tj.save_adapter(tmp_path, model, method, adapter)
    other, again = tj.load_adapter(tmp_path, model)
    assert other.init.func is lora(rank=2).init.func  # type: ignore[attr-defined]
    jax.tree.map(np.testing.assert_array_equal, again, tree.thawed(adapter))


def test_equal_settings_are_one_method():
    assert lora_fa(rank=2) == lora_fa(rank=2)
    assert lora_fa(rank=2) != lora_fa(rank=3)


def test_over_a_quantised_base_it_is_the_update_over_the_dequantised_one():
    model, method = helpers.tiny(), lora_fa(rank=2)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


def test_settings_are_checked_as_loras_are():
    with pytest.raises(ValueError, match=r"dropout=1.5 is not a probability"):
        lora_fa(dropout=1.5)
    with pytest.raises(ValueError, match="rank=17 is above the sides"):
        lora_fa(rank=17).init(KEY, helpers.tiny().params)


class TestContract(contract.Contract):
    methods = {"plain": lora_fa(rank=2, alpha=4.0)}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_it_trains_as_peft_does_with_a_frozen(tmp_path):
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=library.ALL)
    model = library.base(tmp_path / "base")
    theirs = library.wrapped(tmp_path / "base", config)
    theirs.save_pretrained(tmp_path / "theirs")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    method = lora_fa(rank=3, alpha=6.0)
    read = tree.flatten(tj.load_adapter(tmp_path / "theirs", model)[1])
    adapter = tree.unflatten(
        {n: tj.types.Frozen(x) if n.endswith("/a") else x for n, x in read.items()}
    )
    expected = library.trace(theirs, library.adamw(theirs, 1e-2))
    found, state = library.our_trace(model, method, adapter, optax.adamw(1e-2, weight_decay=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    tj.save_adapter(tmp_path / "ours", model, method, state.params)
    again = library.loaded(tmp_path / "base", tmp_path / "ours")
    library.assert_same(
        library.logits(again), library.our_logits(model, method, state.params), 1e-5
    )
