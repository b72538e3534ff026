"""Scorers: the head's value at a completion's last token, however rows are laid out and split."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers, toy
from trainjax import data, evals
from trainjax.data import pipeline
from trainjax.losses import bradley_terry, ensemble
from trainjax.peft import lora
from trainjax.scorers import last_token_scores

PAIRS = [
    {"prompt": f"say {'ab' * (i % 3)}{i}", "chosen": f"{i}" * (1 + i % 3), "rejected": f"no {i}"}
    for i in range(8)
]
SIZES = {"vocab_size": 260}  # the toy tokenizer's, and one that devices divide
LORA = lora(rank=2, alpha=4.0)
KEY = jax.random.key(0)


@jax.jit
def scored(scorer, params, batch):
    return scorer(params, batch)


@functools.cache
def encoded(share: bool) -> data.Examples:
    return data.encode_groups(PAIRS, toy.tokenizer(), 64, share_prompt=share)


@functools.cache
def setting(full: bool, mesh=None):
    """A scorer and params that are far from its beginning."""
    model, method = helpers.tiny(mesh=mesh, **SIZES), None if full else LORA
    params = tj.init_scorer(KEY, model, method)
    if method is not None:
        params["body"] = helpers.trained(method, model.params)
    params["score"] = helpers.randomised(params["score"])
    return tj.scorer(model, method), params


@functools.cache
def one_by_one(full: bool) -> np.ndarray:
    """Each completion with its prompt in a row of its own, and the state of its last token."""
    scorer, params = setting(full)
    hidden = jax.jit(lambda body, tokens: scorer.body.hidden(body, {"tokens": tokens}))
    kernel = np.asarray(params["score"]["kernel"], np.float64)
    found = []
    for row in PAIRS:
        for answer in (row["chosen"], row["rejected"]):
            text = [{"prompt": row["prompt"], "completion": answer}]
            tokens = data.encode(text, toy.tokenizer(), 64).tokens
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens)] = tokens
            state = np.asarray(hidden(params["body"], padded))[0, len(tokens) - 1]
            found.append(state.astype(np.float64) @ kernel)
    return np.reshape(found, (8, 2))


FULL = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])


@FULL
@pytest.mark.parametrize("pack", [data.unpacked, data.best_fit], ids=["padded", "packed"])
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_a_score_is_of_the_last_token_however_rows_are_laid_out(full, pack, share):
    scorer, params = setting(full)
    plan = data.Plan(2, 256 if pack is data.best_fit else 160, pack, seed=1)
    found = evals.scores(scorer, params, encoded(share), plan)
    np.testing.assert_allclose(found, one_by_one(full), rtol=0, atol=1e-5)


def batch_of(share: bool = True, mesh=None):
    plan = data.Plan(8, 160, data.unpacked, seed=None)
    (batch,) = plan.epoch(encoded(share), 0)
    arrays = data.fill(encoded(share), plan, batch)
    return pipeline.to_devices(arrays, mesh, 8)


@functools.cache
def expected(full: bool):
    scorer, params = setting(full)
    return helpers.loss_and_gradients(bradley_terry(scorer, 0.1), params, batch_of())


def shapes_of_gradient(loss, params) -> set[tuple[int, ...]]:
    """Of all arrays that the gradient's program makes."""
    gradient = jax.grad(lambda params, loss, batch: loss(params, batch)[0])
    return helpers.shapes_in(jax.make_jaxpr(gradient)(params, loss, batch_of()).jaxpr)


def assert_same(found, wanted) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5)
    helpers.assert_close(found[1], wanted[1], 1e-5)


@FULL
def test_micro_batches_add_up_to_the_batch(full):
    scorer, params = setting(full)
    found = helpers.loss_and_gradients(bradley_terry(scorer, 0.1), params, batch_of(), 4)
    assert_same(found, expected(full))


@pytest.mark.parametrize(
    ("full", "split"),
    [
        (False, (1, 2, 2)),
        (True, (1, 4, 1)),
        pytest.param(False, (4, 1, 1), marks=pytest.mark.slow),
        pytest.param(True, (1, 1, 4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_split_over_devices_is_one_device(full, split):
    mesh = helpers.mesh_of(*split)
    scorer, params = setting(full, mesh)
    found = helpers.loss_and_gradients(bradley_terry(scorer, 0.1), params, batch_of(mesh=mesh))
    assert_same(found, expected(full))


def test_gradients_are_those_of_the_closed_form():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((2, 5, 3)), rng.standard_normal((3, 2))
    completions = jnp.asarray([[0, 1, 1, 2, 0], [2, 0, 0, 1, 0]], jnp.int32)
    weights = rng.standard_normal((2, 3, 2))

    def total(hidden, kernel):
        return jnp.sum(
            last_token_scores(hidden, kernel, completions, 3) * weights.astype(np.float32)
        )

    rounded = [x.astype(np.float32) for x in (hidden, kernel)]
    slopes = jax.jit(jax.grad(total, (0, 1)))(*rounded)
    states = np.zeros((2, 3, 3))  # the third completion is nowhere
    states[0, :2], states[1, :2] = rounded[0][0, [2, 3]], rounded[0][1, [3, 0]]
    given = weights.astype(np.float32)
    np.testing.assert_allclose(slopes[1], np.einsum("bce,bco->eo", states, given), rtol=1e-5)
    expected = np.zeros_like(hidden)
    for row, place, completion in ((0, 2, 0), (0, 3, 1), (1, 3, 0), (1, 0, 1)):
        expected[row, place] = rounded[1] @ given[row, completion]
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-5, atol=1e-7)


def test_a_completion_that_is_nowhere_scores_zero_and_states_of_padding_are_not_read():
    hidden = jnp.asarray([[[1.0], [2.0], [jnp.nan]]])
    completions = jnp.asarray([[1, 1, 0]], jnp.int32)

    def total(hidden):
        return jnp.sum(last_token_scores(hidden, jnp.ones((1, 1)), completions, 2))

    value, slope = jax.jit(jax.value_and_grad(total))(hidden)
    assert float(value) == 2.0
    np.testing.assert_array_equal(slope, [[[0.0], [1.0], [0.0]]])


def test_gradients_are_finite_with_rows_of_padding_and_large_weights():
    scorer, params = setting(False)
    params = jax.tree.map(lambda x: 100 * x, params)
    plan = data.Plan(12, 160, data.unpacked, seed=None)  # eight pairs, four rows of padding
    (rows,) = plan.epoch(encoded(True), 0)
    batch = data.fill(encoded(True), plan, rows)
    loss, gradients = helpers.loss_and_gradients(bradley_terry(scorer), params, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_several_objectives_are_a_last_axis():
    model = helpers.tiny(**SIZES)
    params = tj.init_scorer(KEY, model, LORA, objectives=3)
    scorer, batch = tj.scorer(model, LORA), batch_of()
    found = scored(scorer, params, batch)
    assert found.shape == (8, 1, 2, 3)
    for objective in range(3):
        kernel = params["score"]["kernel"][:, objective : objective + 1]
        one = scored(scorer, params | {"score": {"kernel": kernel}}, batch)
        np.testing.assert_allclose(found[..., objective], one, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="objectives=0: a scorer gives at least one score"):
        tj.init_scorer(KEY, model, LORA, objectives=0)


def test_at_first_the_body_is_the_base_and_the_head_is_small():
    model = helpers.tiny(**SIZES)
    full, adapter = tj.init_scorer(KEY, model), tj.init_scorer(KEY, model, LORA)
    found = [
        scored(tj.scorer(model, method), params, batch_of())
        for method, params in ((None, full), (LORA, adapter))
    ]
    np.testing.assert_array_equal(*found)
    kernel = np.asarray(full["score"]["kernel"])
    assert kernel.dtype == np.float32
    assert 0.01 < kernel.std() < 0.03  # initializer_range is 0.02 where a model names none


def test_no_array_of_the_vocabularys_size_is_made_and_the_head_is_not_held():
    model = helpers.tiny(**SIZES)
    scorer, params = tj.scorer(model, LORA), tj.init_scorer(KEY, model, LORA)
    assert "head" in model.params
    assert "head" not in scorer.body.base
    assert "head" not in tj.init_scorer(KEY, model)["body"]
    shapes = shapes_of_gradient(bradley_terry(scorer), params)
    assert not any(260 in shape for shape in shapes)


def test_groups_of_another_size_are_refused():
    scorer, params = setting(False)
    singles = data.encode_groups(
        [{"prompt": "a", "completion": "b"}], toy.tokenizer(), 64, read=data.single
    )
    with pytest.raises(ValueError, match="gives 2 scores a group; of groups of another size"):
        evals.scores(scorer, params, singles, data.Plan(1, 64, data.unpacked))


# --- ensembles ----------------------------------------------------------------------------------

MEMBERS = 3


@functools.cache
def members():
    model = helpers.tiny(**SIZES)
    keys = jax.random.split(jax.random.key(1), MEMBERS)
    start = jax.jit(jax.vmap(lambda key: tj.init_scorer(key, model, LORA)))
    return tj.scorer(model, LORA), start(keys)


@pytest.mark.parametrize(
    "tx",
    [pytest.param(optax.sgd(0.5), marks=pytest.mark.slow), optax.adamw(1e-2)],
    ids=["sgd", "adamw"],
)
def test_members_of_an_ensemble_train_as_each_would_alone(tx):
    scorer, params = members()
    batch, step = batch_of(), tj.train.make_step(tx)

    def trained(loss, params):
        state = tj.train.init(params, tx)
        for _ in range(3):
            state, metrics = step(state, loss, batch)
        return jax.device_get((tj.tree.flatten(state.params), metrics))

    loss = bradley_terry(scorer, 0.1)
    together, metrics = trained(ensemble(loss), params)
    apart = [trained(loss, jax.tree.map(lambda x, k=k: x[k], params)) for k in range(MEMBERS)]
    for k, (own, _) in enumerate(apart):
        helpers.assert_close({name: x[k] for name, x in together.items()}, own, 1e-5)
    for name in ("accuracy", "margin", "mean_reward"):
        np.testing.assert_allclose(metrics[name], np.mean([m[name] for _, m in apart]), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], sum(m["loss"] for _, m in apart), rtol=1e-5)


def test_members_begin_apart_and_the_base_is_there_once_for_all():
    scorer, params = members()
    assert all((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(params) if leaf.any())
    found = shapes_of_gradient(ensemble(bradley_terry(scorer)), params)
    stacks = [leaf.shape for leaf in jax.tree.leaves(scorer.body.base["layers"]) if leaf.ndim == 3]
    for layers, *matrix in stacks:
        for copied in ((MEMBERS, *matrix), (MEMBERS, layers, *matrix), (layers, MEMBERS, *matrix)):
            assert copied not in found
