"""LoRA+: its two learning rates are two parameter groups, in Optax and in PEFT."""

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
from trainjax.peft import lora
from trainjax.peft.lora_plus import lora_plus

KEY = jax.random.key(0)


def adamw(rate):
    return optax.adamw(rate, weight_decay=0.1)


def steps_of(tx, params, grads):
    """Params after each of the gradients."""
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("schedule", [False, True])
def test_it_is_two_groups_of_adamw_weight_decay_included(schedule):
    method = lora_plus(rank=2, ratio=16.0, target="up|query")
    params = contract.moved(method.init(KEY, helpers.tiny().params))
    grads = [contract.moved(params, seed) for seed in range(5)]
    rate = optax.linear_schedule(1e-2, 0.0, 6) if schedule else lambda count: 1e-2
    labels = tree.map_named(lambda name, leaf: name.rpartition("/")[2], params)
    with jax.numpy_dtype_promotion("standard"):
        groups = {"a": adamw(rate), "b": adamw(lambda count: 16 * rate(count))}
        expected = steps_of(optax.multi_transform(groups, labels), params, grads)
        found = steps_of(method.transform(5, adamw(rate)), params, grads)
    helpers.assert_close(tree.flatten(found), tree.flatten(expected), 1e-6)


def test_what_is_not_an_adapter_keeps_the_optimizers_rate():
    """A scorer's head beside an adapter, and a bias that is called b."""
    method = lora_plus(ratio=4.0)
    tx = method.transform(1, optax.sgd(1.0))
    params = {
        "body": {"up": {"kernel": {"a": jnp.ones(2), "b": jnp.ones(2)}}},
        "score": {"b": jnp.ones(2)},
    }
    updates, _ = tx.update(params, tx.init(params), params)
    found = {name: float(leaf[0]) for name, leaf in tree.flatten(updates).items()}
    assert found == {"body/up/kernel/a": -1.0, "body/up/kernel/b": -4.0, "score/b": -1.0}


def test_it_is_lora_but_for_its_rates(tmp_path):
    model, method = helpers.tiny(), lora_plus(rank=2, target="up")
    adapter = method.init(KEY, model.params)
    jax.tree.map(
        np.testing.assert_array_equal, adapter, lora(rank=2, target="up").init(KEY, model.params)
    )
    tj.save_adapter(tmp_path, model, method, adapter)
    assert tj.load_adapter(tmp_path, model)[0].transform is None


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(
        ValueError, match=rf"ratio={ratio}: B's learning rate over A's is a positive"
    ):
        lora_plus(ratio=ratio)


def test_equal_settings_are_one_method():
    assert lora_plus(rank=2, ratio=8.0) == lora_plus(rank=2, ratio=8.0)
    assert lora_plus(ratio=8.0) != lora_plus(ratio=9.0)


def test_over_a_quantised_base_it_is_the_update_over_the_dequantised_one():
    model, method = helpers.tiny(), lora_plus(rank=2)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


class TestContract(contract.Contract):
    methods = {"plain": lora_plus(rank=2, alpha=4.0)}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_it_trains_as_pefts_optimizer_does(tmp_path):
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=library.ALL)
    model = library.base(tmp_path / "base")
    theirs = library.wrapped(tmp_path / "base", config)
    theirs.save_pretrained(tmp_path / "theirs")
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    _, adapter = tj.load_adapter(tmp_path / "theirs", model)
    method = lora_plus(rank=3, alpha=6.0, ratio=16.0)
    expected = library.trace(theirs, optimizer)
    found, _ = library.our_trace(model, method, adapter, optax.adamw(1e-3, weight_decay=0.1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    plain, _ = library.our_trace(model, lora(3, 6.0), adapter, optax.adamw(1e-3, weight_decay=0.1))
    assert np.abs(plain - expected).max() > 1e-2
