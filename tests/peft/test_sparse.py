"""Sparse masks: which entries train, by which scores, and that nothing of a whole stack is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import estimate, losses, tree
from trainjax.peft.sparse import Sparse, from_peft, sparse
from trainjax.policies import policy
from trainjax.types import PeftFiles

KEY = jax.random.key(0)


def device_batch():
    return jax.tree.map(jnp.asarray, helpers.random_batch(rows=2))


def chosen(adapter) -> dict[str, np.ndarray]:
    named = tree.flatten(tree.thawed(adapter)).items()
    return {n.removesuffix("/indices"): np.asarray(v) for n, v in named if n.endswith("indices")}


def test_the_share_of_each_matrix_is_the_density_and_at_least_one_entry():
    """TINY's matrices are 32 x 32, 32 x 16, 32 x 48 and 48 x 32; 2 layers."""
    params = helpers.tiny().params
    found = chosen(sparse(0.1).init(KEY, params))
    sizes = {name.split("/")[2]: indices.shape for name, indices in found.items()}
    assert sizes == {
        **dict.fromkeys(("query", "output"), (2, 102)),
        **dict.fromkeys(("key", "value"), (2, 51)),
        **dict.fromkeys(("gate", "up", "down"), (2, 154)),
    }
    assert chosen(sparse(1e-9, "key").init(KEY, params))["layers/attention/key/kernel"].shape == (
        2,
        1,
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_scores_are_chosen_whatever_their_sign(sign):
    params = helpers.tiny().params
    scores = jax.tree.map(lambda leaf: jnp.array(sign * np.asarray(leaf)), params)
    for name, indices in chosen(sparse(0.05).init(KEY, params, scores)).items():
        w = np.abs(np.asarray(tree.flatten(params)[name])).reshape(2, -1)
        for layer in (0, 1):
            best = np.sort(np.argsort(-w[layer])[: indices.shape[1]])
            np.testing.assert_array_equal(indices[layer], best, name)


def test_random_entries_are_distinct_even_and_other_ones_in_each_matrix():
    params = {"layers": {n: {"kernel": jnp.zeros((2, 50, 40))} for n in ("a", "b")}}
    found = chosen(sparse(0.5).init(KEY, params))
    rows = [row for indices in found.values() for row in indices]
    assert all(len(set(row.tolist())) == 1000 for row in rows)
    assert len({tuple(row) for row in rows}) == 4
    # Of 4 x 1000 draws half are of the first 25 rows; a standard deviation is below 32.
    assert abs(sum((row < 1000).sum() for row in rows) - 2000) < 4 * 32


def test_a_gradient_and_a_fisher_of_the_whole_model_are_scores():
    model = helpers.tiny()
    loss, batch = losses.sft(policy(model)), device_batch()
    grads = jax.jit(jax.grad(lambda params: loss(params, batch)[0]))(model.params)
    fisher = estimate.fisher(loss, model.params, [batch])
    method = sparse(0.02, "query|down")
    by_gradient, by_fisher = (chosen(method.init(KEY, model.params, s)) for s in (grads, fisher))
    name = "layers/mlp/down/kernel"
    assert set(by_gradient) == set(by_fisher) == {name, "layers/attention/query/kernel"}
    least = np.take_along_axis(
        np.asarray(tree.flatten(fisher)[name]).reshape(2, -1), by_fisher[name], 1
    )
    assert (least > np.median(tree.flatten(fisher)[name])).all()
    assert not np.array_equal(by_gradient[name], by_fisher[name])


def test_values_are_added_to_their_entries():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
    indices = jnp.asarray([[0, 5], [7, 11]])
    values = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    expected = np.asarray(w).copy()
    expected[0, 0, 0] += 1
    expected[0, 1, 1] += 2
    expected[1, 1, 3] += 3
    expected[1, 2, 3] += 4
    stack = Sparse(w, indices, values)
    np.testing.assert_allclose(stack.dense(), expected, rtol=1e-6)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32)
    found = jax.jit(jax.vmap(lambda x, one: x @ one, (None, 0)))(x, stack)
    np.testing.assert_allclose(found, np.asarray(x) @ expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", [None, "full"])
def test_a_step_makes_nothing_of_the_size_of_all_layers(remat):
    """Not even where the layers keep what they have computed for the backward pass."""
    kept = {"remat": None} if remat is None else {}

    def of_three(name, leaf):
        return jnp.array(np.asarray(leaf)[[0, 1, 0]]) if name.startswith("layers/") else leaf

    model = contract.changed(helpers.tiny(), **kept)
    params = tree.map_named(of_three, model.params)
    model = contract.configured(model, params, num_layers=3)
    method = sparse(0.01)
    loss, batch = losses.sft(policy(model, method)), device_batch()
    adapter = tree.trainable(first := method.init(KEY, model.params))

    def value(trained):
        return loss(tree.with_trained(first, trained), batch)[0]

    made = helpers.shapes_in(jax.make_jaxpr(jax.grad(value))(adapter).jaxpr)
    assert (32, 48) in made
    assert not {(3, 32, 48), (3, 48, 32), (3, 32, 16)} & made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density=0.0 is a share of the entries, above 0"),
        ({"density": 1.5}, "density=1.5 is a share"),
        ({"target": "qeury"}, "matches 'qeury'; the names are .*layers/attention/query/kernel"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        sparse(**settings).init(KEY, helpers.tiny().params)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "the scores have none of layers/attention/query/kernel"),
        (jnp.ones((2, 32, 16)), r"query/kernel are \(2, 32, 16\), the matrix is \(2, 32, 32\)"),
        (jnp.full((2, 32, 32), jnp.nan), "query/kernel are not all finite"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_scores_that_do_not_fit_are_named(scores, message):
    given = {"layers": {"attention": {"query": {"kernel": scores}}}}
    with pytest.raises(ValueError, match=message):
        sparse(0.1, "query").init(KEY, helpers.tiny().params, given)


@pytest.mark.parametrize("spoil", [lambda i: i[:, ::-1], lambda i: i * 0, lambda i: i - 1024])
def test_indices_of_a_file_that_are_no_entries_are_named(spoil):
    params, method = helpers.tiny().params, sparse(0.01, "query")
    files = method.export(method.init(KEY, params), {})
    name = "frozen:layers/attention/query/kernel/indices"
    tensors = files.tensors | {name: np.ascontiguousarray(spoil(files.tensors[name]))}
    with pytest.raises(ValueError, match="query/kernel/indices are not distinct entries, in order"):
        from_peft(PeftFiles(files.fields, tensors), {}, params)


class TestContract(contract.Contract):
    methods = {"all": sparse(0.05), "some": sparse(0.2, "query|down")}
