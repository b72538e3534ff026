"""Full and partial tuning: what trains, by name and layer, and what the model then computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import losses, tree
from trainjax.peft.lora import lora
from trainjax.peft.partial import from_peft, full, partial, trained_layers
from trainjax.policies import policy

KEY = jax.random.key(0)
QUERY = "layers/attention/query/kernel"


@functools.cache
def four_layers():
    """The tiny model's params twice over, layers 2 and 3 the negatives of 0 and 1."""

    def leaf(name, x):
        x = np.asarray(x)
        return jnp.array(np.concatenate([x, -x]) if name.startswith("layers/") else x)

    return tree.map_named(leaf, helpers.tiny().params)


def shapes(method, params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.flatten(method.init(KEY, params)).items()}


def test_layers_by_number_are_the_only_ones_in_the_adapter():
    params = four_layers()
    assert shapes(partial("layers/(1|3)/attention/query|^norm"), params) == {
        QUERY: (2, 32, 32),
        "norm/scale": (32,),
    }
    adapter = partial("layers/(1|3)/").init(KEY, params)
    w = tree.flatten(params)[QUERY]
    np.testing.assert_array_equal(tree.flatten(adapter)[QUERY], w[jnp.asarray([1, 3])])


def test_a_name_without_a_number_is_of_all_layers():
    params = helpers.tiny().params
    assert shapes(partial("query"), params) == {QUERY: (2, 32, 32)}
    assert trained_layers("query|norm/", params)["norm/scale"] is None


def test_full_tuning_is_every_leaf_in_float32():
    params = tree.cast(helpers.tiny().params, jnp.bfloat16)
    adapter = full().init(KEY, params)
    expected = tree.cast(params, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    attached = full().attach(params, adapter)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (attached, adapter)), strict=True))


@pytest.mark.parametrize("merged", [False, True])
def test_trained_layers_are_put_into_the_stack_and_others_stay(merged):
    params, method = four_layers(), partial("layers/(0|2)/mlp/up")
    adapter = jax.tree.map(lambda leaf: leaf + 1, method.init(KEY, params))
    found = (method.merge if merged else method.attach)(params, adapter)
    for name, leaf in tree.flatten(found).items():
        old = tree.flatten(params)[name]
        added = np.asarray([1, 0, 1, 0], np.float32)[:, None, None] if "mlp/up" in name else 0
        np.testing.assert_array_equal(leaf, old + added, name)


def test_the_gradient_is_that_of_full_tuning_in_those_layers_and_of_a_tied_head_in_both_its_places():
    params = {name: part for name, part in four_layers().items() if name != "head"}
    model = contract.configured(helpers.tiny(), params, num_layers=4, tie_embeddings=True)
    batch = helpers.random_batch(rows=2)
    pattern = "layers/(1|3)/(attention|mlp_norm)|^norm|embed"
    method = partial(pattern)
    _, all_of_it = helpers.loss_and_gradients(losses.sft(policy(model)), model.params, batch)
    adapter = method.init(KEY, model.params)
    _, found = helpers.loss_and_gradients(losses.sft(policy(model, method)), adapter, batch)
    expected = {
        name: all_of_it[name] if numbers is None else all_of_it[name][list(numbers)]
        for name, numbers in trained_layers(pattern, model.params).items()
    }
    helpers.assert_close(found, expected, 1e-6)
    name = "embed/embedding"
    unseen = np.setdiff1d(np.arange(61), batch["tokens"])
    assert len(unseen) > 0
    assert found[name][unseen].any()  # rows that only the head reads


def test_norms_in_bfloat16_see_steps_that_are_small_beside_them():
    params = tree.cast(four_layers(), jnp.bfloat16)
    method = partial("layers/1/mlp_norm")
    adapter = jax.tree.map(lambda leaf: leaf + 1e-4, method.init(KEY, params))
    scale = method.attach(params, adapter)["layers"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(scale[1], adapter["layers"]["mlp_norm"]["scale"][0])


def test_a_matrix_that_is_no_array_is_refused_and_others_train():
    params = helpers.tiny().params
    low = lora(rank=2, target="query")
    quantised = low.attach(params, low.init(KEY, params))  # any Weight
    with pytest.raises(
        ValueError, match=f"{QUERY} is a Lora, and a quantised matrix does not train"
    ):
        full().init(KEY, quantised)
    assert shapes(partial("attention_norm"), quantised) == {"layers/attention_norm/scale": (2, 32)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qeury", "name matches 'qeury'; the names are .*query/kernel.* as in layers/0/"),
        ("layers/2/", "no parameter's name matches 'layers/2/'"),
        ("(", r"'\(' is not a regular expression"),
    ],
)
def test_a_bad_target_is_named_with_what_would_be_right(target, message):
    with pytest.raises(ValueError, match=message):
        partial(target).init(KEY, helpers.tiny().params)


def test_an_adapter_of_other_names_is_refused():
    params = helpers.tiny().params
    for use in (partial("query").attach, partial("query").merge):
        with pytest.raises(ValueError, match="the adapter has 'norm/scale', which the model does"):
            use(params, {"norm": {"scale": jnp.ones(32)}})


def test_files_of_a_model_with_other_layers_do_not_fit():
    method = partial("layers/[13]/")
    files = method.export(method.init(KEY, four_layers()), {})
    with pytest.raises(ValueError, match=r"has the shape \(2, .*this model's has \(1, "):
        from_peft(files, {}, helpers.tiny().params)


class TestContract(contract.Contract):
    methods = {"some layers": partial("layers/1/|^norm"), "full": full()}
