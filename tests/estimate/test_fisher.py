"""The Fisher: per example and not of a mean, empirical and true, on several devices, saved."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import trainjax as tj
from tests import bigram, families, helpers
from trainjax import parallel, tree
from trainjax.estimate import fisher, running
from trainjax.losses import sft
from trainjax.losses.continual import ewc
from trainjax.models import load, save_model
from trainjax.ops.vocab import TokenStats
from trainjax.peft import lora
from trainjax.types import Loss, pytree

LORA = lora(rank=2, target="query|up")
SIZES = {"vocab_size": 64}  # that the devices divide


@functools.cache
def setting(kind: str, mesh=None):
    """The policy, and the params or the adapter that it is of."""
    if kind == "narrow":
        return bigram.Narrow(), bigram.narrow_params(mesh)
    model = helpers.tiny(mesh=mesh, **SIZES)
    if kind == "full":
        return tj.policy(model), model.params
    return tj.policy(model, LORA), helpers.trained(LORA, model.params)


def by_loop(policy, params, batch) -> dict[str, np.ndarray]:
    """The mean of squared gradients, one example after the other, each a batch of its own."""

    @jax.jit
    def gradient(params, row):
        return jax.grad(lambda p: -jnp.sum(row["weights"] * policy(p, row).logprobs))(params)

    squares = []
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        row = {"tokens": tokens[None], "weights": (weights[None] > 0).astype(np.float32)}
        found = tree.flatten(jax.device_get(gradient(params, row)))
        squares.append({name: leaf.astype(np.float64) ** 2 for name, leaf in found.items()})
    return {name: np.mean([s[name] for s in squares], axis=0) for name in squares[0]}


def assert_same(found, wanted, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of each array's largest number."""
    found = tree.flatten(found)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(np.abs(value).max())
        error = np.abs(np.asarray(found[name], np.float64) - value).max()
        assert error <= tolerance * scale, (name, error, scale)


@functools.cache
def expected(kind: str):
    return by_loop(*setting(kind), helpers.random_batch(rows=5))


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("narrow", 1),
        ("narrow", 2),
        ("narrow", 5),
        pytest.param("lora", 2, marks=pytest.mark.slow),
        pytest.param("full", 1, marks=pytest.mark.slow),
        pytest.param("full", 5, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_mean_of_the_squared_gradients_of_the_examples(kind, chunk):
    """Chunks of 2 do not divide five rows: the last is filled up."""
    policy, params = setting(kind)
    found = fisher(sft(policy), params, [helpers.random_batch(rows=5)], chunk=chunk)
    assert_same(found, expected(kind))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_examples_in_several_batches_are_those_of_one():
    policy, params = setting("narrow")
    batch = helpers.random_batch(rows=5)
    parts = [
        {name: leaf[part] for name, leaf in batch.items()} for part in (slice(0, 2), slice(2, 5))
    ]
    assert_same(fisher(sft(policy), params, parts), expected("narrow"))


def test_weights_say_only_which_tokens_are_targets():
    policy, params = setting("narrow")
    batch = helpers.random_batch(rows=5)
    other = dict(batch, weights=batch["weights"] * np.linspace(1, 9, 5, dtype=np.float32)[:, None])
    assert_same(fisher(sft(policy), params, [other]), expected("narrow"))


def test_padding_and_rows_without_targets_do_not_count():
    policy, params = setting("narrow")
    batch = helpers.random_batch(rows=5)
    padded = {name: np.pad(leaf, ((0, 3), (0, 4))) for name, leaf in batch.items()}
    assert_same(fisher(sft(policy), params, [padded]), expected("narrow"))


# --- toys whose Fisher is known -----------------------------------------------------------------


def linear(inputs, params, batch, key):
    """`sum of weights * (theta . x)`: the gradient of an example is its x."""
    return jnp.sum(batch["weights"][:, 0] * (batch["x"] @ params["theta"])), {}


def test_gradients_that_cancel_in_a_batch_do_not_cancel_in_the_fisher():
    """x and -x: the squared mean gradient is 0, the mean square is x^2."""
    x = np.array([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]], np.float32)
    batch = {"x": x, "weights": np.full((2, 1), 0.5, np.float32)}
    params = {"theta": jnp.ones(3)}
    mean = jax.grad(lambda p: Loss(linear)(p, batch)[0])(params)
    assert not np.asarray(mean["theta"]).any()
    for chunk in (1, 2):
        found = fisher(Loss(linear), params, [batch], chunk=chunk)
        np.testing.assert_array_equal(found["theta"], [1.0, 4.0, 9.0])


def softmax_regression(inputs, params, batch, key):
    logprobs = jax.nn.log_softmax(batch["x"] @ params["w"] + params["b"])
    chosen = jnp.take_along_axis(logprobs, batch["y"][:, None], axis=1)[:, 0]
    return -jnp.sum(batch["weights"][:, 0] * chosen), {}


def test_it_is_avalanches_diagonal_fisher_at_mini_batches_of_one():
    """`EWCPlugin.compute_importances`: for each mini-batch the squared gradient of the mean
    cross-entropy, over the number of mini-batches; in float64 for softmax regression, where the
    gradient is `x (p - onehot(y))`.
    """
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape) for shape in ((12, 4), (4, 3), (3,)))
    y = rng.integers(0, 3, 12)
    importances = {"b": np.zeros(3), "w": np.zeros((4, 3))}
    for i in range(12):  # a mini-batch each
        logits = x[i] @ w + b
        p = np.exp(logits - np.logaddexp.reduce(logits))
        gradient = p - np.eye(3)[y[i]]
        importances["b"] += gradient**2 / 12
        importances["w"] += np.outer(x[i], gradient) ** 2 / 12
    batch = {
        "x": x.astype(np.float32),
        "y": y.astype(np.int32),
        "weights": np.full((12, 1), 1 / 12, np.float32),
    }
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    assert_same(fisher(Loss(softmax_regression), params, [batch], chunk=4), importances)


@pytree
class Categorical:
    """A policy whose every token is drawn from `softmax(params)`, whatever came before."""

    unused: Any = None

    def __call__(self, params, batch, key=None, where=None):
        logprobs = jax.nn.log_softmax(params["logits"])[batch.get("targets", batch["tokens"])]
        return TokenStats(logprobs, jnp.zeros_like(logprobs), jnp.zeros_like(logprobs))

    def draw(self, params, batch, key):
        shape = batch["tokens"].shape
        return jax.random.categorical(key, params["logits"], shape=shape).astype(jnp.int32)


def test_the_true_fisher_of_a_categorical_is_the_analytic_one_and_the_empirical_is_of_the_labels():
    """For logits and one target the gradient is `onehot(y) - p`. Its square has the mean
    `p_i (1 - p_i)` when y is drawn from p; four standard errors of 4096 draws. Labels that are all
    token 0 give `(onehot(0) - p)^2`.
    """
    params = {"logits": jnp.asarray([1.0, 0.0, -1.0, 0.5, -2.0])}
    p = np.exp(np.asarray(params["logits"], np.float64))
    p /= p.sum()
    rows, policy = 1024, Categorical()
    batch = {
        "tokens": np.zeros((rows, 2), np.int32),
        "weights": np.tile(np.float32([0, 1]), (rows, 1)),
    }
    true = fisher(
        sft(policy), params, [batch] * 4, sampler=policy, key=jax.random.key(0), chunk=256
    )["logits"]
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2
    errors = np.sqrt(variance / (4 * rows))
    np.testing.assert_array_less(np.abs(np.asarray(true) - p * (1 - p)), 4 * errors)
    empirical = fisher(sft(policy), params, [batch])["logits"]
    np.testing.assert_allclose(empirical, (np.eye(5)[0] - p) ** 2, rtol=1e-4)


def test_the_true_fisher_draws_anew_in_each_batch_and_by_key():
    policy, params = Categorical(), {"logits": jnp.zeros(50)}
    batch = {"tokens": np.zeros((1, 2), np.int32), "weights": np.float32([[0, 1]])}
    make = functools.partial(fisher, sft(policy), params, sampler=policy)
    once = make([batch], key=jax.random.key(0))["logits"]
    np.testing.assert_array_equal(once, make([batch], key=jax.random.key(0))["logits"])
    drawn = make([batch] * 8, key=jax.random.key(0))["logits"]
    assert np.sum(np.asarray(drawn) > 0.01) > 1  # more than one label
    assert np.any(np.asarray(once) != np.asarray(make([batch], key=jax.random.key(1))["logits"]))


def test_the_true_fisher_of_a_model_takes_the_models_own_labels():
    """One seed: the labels drawn through the policy, put in by hand, give the same."""
    policy, params = setting("narrow")
    batch = helpers.random_batch(rows=5)
    key = jax.random.key(3)
    found = fisher(sft(policy), params, [batch], sampler=policy, key=key)
    drawn = jax.jit(lambda p, w, b, k: p.draw(w, b, k))(
        policy, params, batch, jax.random.fold_in(key, 0)
    )
    assert bool(jnp.any(drawn != batch["tokens"]))
    wanted = fisher(sft(policy), params, [dict(batch, targets=drawn)])
    assert_same(found, jax.device_get(tree.flatten(wanted)), 1e-6)


# --- devices, files, programs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("narrow", (4, 1, 1)),
        ("narrow", (1, 2, 2)),
        pytest.param("lora", (4, 1, 1), marks=pytest.mark.slow),
        pytest.param("full", (1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_on_four_devices_it_is_the_same_and_laid_out_as_the_params_are(kind, split):
    mesh = helpers.mesh_of(*split)
    policy, params = setting(kind, mesh)
    batch = helpers.random_batch(rows=8)
    placed = jax.device_put(batch, parallel.rows(mesh))
    found = fisher(sft(policy), params, [placed])
    one, alone = setting(kind)
    assert_same(found, jax.device_get(tree.flatten(fisher(sft(one), alone, [batch]))))
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert leaf.sharding == like.sharding
    value, _ = jax.jit(lambda *args: ewc(params, found, 1.0)(*args))(params, placed)
    assert float(value) == 0


def test_it_is_saved_and_restored_by_orbax_and_safetensors(tmp_path):
    policy, params = setting("narrow")
    found = fisher(sft(policy), params, [helpers.random_batch(rows=5)])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", found)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", found)
    jax.tree.map(np.testing.assert_array_equal, restored, found)
    save_file(jax.device_get(tree.flatten(found)), tmp_path / "fisher.safetensors")
    again = tree.unflatten(load_file(tmp_path / "fisher.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, again, found)
    ewc(params, again, 1.0)


def test_another_fisher_of_the_same_shapes_compiles_nothing(caplog):
    policy, params = setting("narrow")
    fisher(sft(policy), params, [helpers.random_batch(rows=5)])
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fisher(sft(policy), other, [helpers.random_batch(rows=5, seed=1)] * 2)
    assert not [line for line in caplog.messages if "_add_batch" in line and "XLA" in line]


def test_params_in_bf16_have_a_fisher_in_float32():
    params = {"theta": jnp.ones(3, jnp.bfloat16)}
    batch = {"x": jnp.ones((2, 3), jnp.bfloat16), "weights": np.ones((2, 1), np.float32)}

    def narrow(inputs, params, batch, key):
        product = (batch["x"] @ params["theta"]).astype(jnp.float32)
        return jnp.sum(batch["weights"][:, 0] * product), {}

    found = fisher(Loss(narrow), params, [batch])
    assert found["theta"].dtype == jnp.float32
    np.testing.assert_array_equal(found["theta"], np.ones(3))


# --- online -------------------------------------------------------------------------------------


def test_a_running_fisher_forgets_by_its_decay():
    old, new = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([10.0, 20.0])}
    np.testing.assert_allclose(running(old, new, 0.25)["w"], [10.25, 20.5])
    with pytest.raises(ValueError, match="decay=1.5 of the old tasks' Fisher"):
        running(old, new, 1.5)


# --- what is refused ----------------------------------------------------------------------------


def test_packed_rows_are_refused():
    policy, params = setting("narrow")
    packed = helpers.packed([np.arange(3), np.arange(4)], [[0, 1]], seq=8)
    with pytest.raises(ValueError, match="packs 2 examples, and a gradient per example.*unpacked"):
        fisher(sft(policy), params, [packed])


@pytest.mark.parametrize("batches", [0, 1])
def test_batches_without_a_target_are_refused(batches):
    batch = {"x": np.ones((2, 3), np.float32), "weights": np.zeros((2, 1), np.float32)}
    with pytest.raises(ValueError, match="no row of the batches has a target"):
        fisher(Loss(linear), {"theta": jnp.ones(3)}, [batch] * batches)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0: at least one row's gradient is held"):
        fisher(Loss(linear), {"theta": jnp.ones(3)}, [], chunk=0)


def test_a_sampler_without_a_key_is_refused():
    with pytest.raises(ValueError, match="the true Fisher needs a sampler and a key"):
        fisher(Loss(linear), {"theta": jnp.ones(3)}, [], sampler=Categorical())


# --- against torch ------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_it_is_the_mean_of_squared_gradients_that_torch_computes(tmp_path):
    """transformers' Llama, `backward` on each example's summed cross-entropy, padding on the right."""
    import torch

    theirs = families.torch_model("llama_grouped")
    theirs.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (3, 9)).astype(np.int32)
    lengths, prompts = [9, 5, 7], [3, 1, 2]
    trained = np.zeros((3, 9), np.float32)
    squares: dict[str, np.ndarray] = {}
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        trained[row, prompt:length] = 1
        theirs.zero_grad()
        ids = torch.from_numpy(tokens[row : row + 1, :length]).long()
        logprobs = torch.log_softmax(theirs(ids).logits[0, :-1].double(), dim=-1)
        (-logprobs[torch.arange(length - 1), ids[0, 1:]][prompt - 1 :].sum()).backward()
        for name, parameter in theirs.named_parameters():
            square = parameter.grad.double().numpy() ** 2 / 3
            squares[name] = squares.get(name, 0) + square
    model = load(tmp_path / "base")
    batch = {"tokens": tokens, "weights": trained / trained.sum()}
    found = fisher(sft(tj.policy(model)), model.params, [batch])
    save_model(tmp_path / "fisher", model.with_params(found))
    ours = load_file(tmp_path / "fisher" / "model.safetensors")
    for name, value in squares.items():
        if name in ours:
            np.testing.assert_allclose(ours[name] / value.max(), value / value.max(), 0, 1e-5)
    assert len(ours) >= 10
