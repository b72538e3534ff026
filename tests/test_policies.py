"""Policies: log-probabilities aligned with tokens, references, and what may see what."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from trainjax import platform, policies
from trainjax.ops.head import Tile, tile
from trainjax.parallel.collectives import collectives
from trainjax.peft import lora
from trainjax.types import Loss

KEY = jax.random.key(0)
BATCH = helpers.random_batch(rows=2, seq=8)


@jax.jit
def stats(policy, params, batch, key=None, where=None):
    return policy(params, batch, key, where)


@jax.jit
def reference_stats(reference, batch):
    return reference(batch)


def of_all_the_logits(model, tokens) -> np.ndarray:
    """`log p` of each token given those before it; 0 for the first."""
    logits = np.asarray(model.logits(tokens), np.float64)[:, :-1]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.pad(chosen, ((0, 0), (1, 0)))


def test_an_entry_is_of_its_own_token_and_the_first_of_a_row_is_zero():
    model = helpers.tiny()
    found = stats(tj.policy(model), model.params, BATCH)
    expected = of_all_the_logits(model, BATCH["tokens"])
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)
    assert not found.logsumexp[:, 0].any()


def test_only_the_tokens_asked_for_come_out():
    model, where = helpers.tiny(), BATCH["weights"] > 0
    found = stats(tj.policy(model), model.params, BATCH, where=jnp.asarray(where))
    expected = np.where(where, of_all_the_logits(model, BATCH["tokens"]), 0.0)
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)


def test_an_adapter_is_attached_to_the_models_weights():
    model, method = helpers.tiny(), lora(rank=2)
    adapter = helpers.trained(method, model.params)
    merged = model.with_params(method.merge(model.params, adapter))
    found = stats(tj.policy(model, method), adapter, BATCH).logprobs
    expected = of_all_the_logits(merged, BATCH["tokens"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_reference_is_the_base_whatever_the_adapter_and_its_dropout():
    """The policy with a dropout key draws; the reference, run in the same program, does not."""
    model, method = helpers.tiny(), lora(rank=2, dropout=0.5)
    adapter = helpers.trained(method, model.params)

    @jax.jit
    def both(policy, reference, adapter, batch, key):
        return policy(adapter, batch, key).logprobs, reference(batch).logprobs

    policy, reference = tj.policy(model, method), tj.reference(model)
    (one, first), (other, second) = (
        both(policy, reference, adapter, BATCH, jax.random.key(i)) for i in (0, 1)
    )
    assert bool(jnp.any(one != other))
    np.testing.assert_array_equal(first, second)
    expected = of_all_the_logits(model, BATCH["tokens"])
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5)


def test_a_policy_without_params_is_its_base():
    model, method = helpers.tiny(), lora(rank=2)
    found = stats(tj.policy(model, method), None, BATCH).logprobs
    np.testing.assert_array_equal(found, reference_stats(tj.reference(model), BATCH).logprobs)


def test_no_gradient_goes_into_a_reference():
    model = helpers.tiny()

    @jax.jit
    @jax.grad
    def gradient(reference, batch):
        return reference(batch).logprobs.sum()

    found = gradient(tj.reference(model), BATCH)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))


def test_a_reference_follows_the_policy_and_the_step_is_not_compiled_again():
    """TR-DPO. The state is donated to each step, and the reference outlives it."""
    model, method, traces = helpers.tiny(), lora(rank=2), []
    adapter = helpers.trained(method, model.params)
    places = np.tile(np.repeat([0, 1, 2], [2, 3, 3]), (2, 1))
    batch = BATCH | {"completions": jnp.asarray(places), "groups": jnp.full((2, 1), 0.5)}

    def counted(inputs, params, batch, key):
        traces.append(1)
        return inputs(params, batch, key)

    tx = optax.sgd(0.1)
    step, state = tj.train.make_step(tx), tj.train.init(adapter, tx)
    ours, theirs = tj.policy(model, method), tj.reference(model, method, adapter)
    margins, traced = [], 0
    for number in range(1, 5):
        state, metrics = step(state, Loss(counted, tj.losses.dpo(ours, theirs)), batch)
        margins.append(abs(float(metrics["rewards/margins"])))
        traced = len(traces) if number == 1 else traced
        if number == 2:
            theirs = theirs.updated(state.params)
    assert max(margins[0], margins[2]) < 1e-6 < 1e-4 < min(margins[1], margins[3])
    assert len(traces) == traced


def test_a_reference_goes_part_of_the_way():
    model, method = helpers.tiny(), lora(rank=2)
    old, new = (helpers.trained(method, model.params, seed=seed) for seed in (1, 2))
    found = tj.reference(model, method, old).updated(new, 0.25).params
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old, new)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected
    )


@pytest.mark.parametrize(
    ("message", "make"),
    {
        "the base itself and stays": lambda model, a: tj.reference(model).updated(a),
        "needs the adapter": lambda model, a: tj.reference(model, lora(rank=2)),
        "mixup=1.5": lambda model, a: tj.reference(model, lora(rank=2), a).updated(a, 1.5),
    }.items(),
    ids=["base", "method alone", "mixup"],
)
def test_what_cannot_follow_is_one_clear_sentence(message, make):
    model = helpers.tiny()
    with pytest.raises(ValueError, match=message):
        make(model, helpers.trained(lora(rank=2), model.params))


def test_a_policy_holds_the_models_arrays_and_no_copy():
    model = helpers.tiny()
    for held in (tj.policy(model, lora(rank=2)).base, tj.reference(model).policy.base):
        assert held is model.params
    assert not jax.tree.leaves(tj.policy(model))  # full fine-tuning: the params come from outside


# --- what a token sees --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"model_type": "mistral", "sliding_window": 3}], ids=["causal", "window"]
)
def test_a_state_depends_on_its_token_and_those_before_it_within_reach(settings):
    """By gradient: of each state with respect to each token's embedding. A window of w reaches w - 1
    tokens back in each of two layers.
    """
    model, seq = helpers.tiny(**settings), 8
    table = model.params["embed"]["embedding"]
    tokens = jnp.arange(seq, dtype=jnp.int32)[
        None
    ]  # all different, so a row of the table is a token

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        params = model.params | {"embed": {"embedding": table}}
        hidden = tj.policy(model).hidden(params, {"tokens": tokens})
        return hidden[0] @ jnp.linspace(1.0, 2.0, hidden.shape[-1])

    touched = np.asarray(jnp.any(jacobian(table) != 0, axis=-1))[:, :seq]
    age = np.arange(seq)[:, None] - np.arange(seq)[None]
    reach = 2 * (settings["sliding_window"] - 1) if settings else seq
    np.testing.assert_array_equal(touched, (age >= 0) & (age <= reach))


def test_a_changed_token_changes_nothing_in_another_segment_of_its_row():
    model = helpers.tiny()
    examples = [np.arange(5), np.arange(10, 16), np.arange(20, 23)]
    batch = helpers.packed(examples, [[0, 1, 2]], seq=16)
    hidden = jax.jit(lambda batch: tj.policy(model).hidden(model.params, batch))
    changed = dict(batch, tokens=batch["tokens"].copy())
    changed["tokens"][0, 5] = 60  # the first of the second segment
    differs = np.asarray(jnp.any(hidden(batch) != hidden(changed), axis=-1))[0]
    np.testing.assert_array_equal(differs, batch["segments"][0] == 2)


@pytest.mark.parametrize(
    ("shape", "trained", "tied"),
    [
        ((1, 4, 1), True, True),
        ((1, 4, 1), False, False),
        ((4, 1, 1), True, False),
        ((4, 1, 1), False, True),
        ((1, 2, 2), True, True),
        ((1, 2, 2), False, False),
    ],
)
def test_a_head_is_fetched_and_its_gradient_added_up_once_and_not_for_each_chunk_of_tokens(
    shape, trained, tied
):
    """What a step sends does not grow with the chunks that go through the head."""
    mesh = helpers.mesh_of(*shape)
    model = helpers.tiny(mesh=mesh, tie_word_embeddings=tied, vocab_size=5000)
    method = None if trained else lora(rank=2)
    params = model.params if method is None else method.init(KEY, model.params)
    batch = jax.device_put(helpers.random_batch(rows=4, seq=300), tj.parallel.rows(mesh))
    loss = tj.losses.sft(tj.policy(model, method))
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    gradient = jax.jit(
        jax.grad(lambda params, loss: loss(params, batch, None)[0]), out_shardings=layout
    )
    program = gradient.lower(params, loss).compile().as_text()
    sent = [
        sum(
            c.sent
            for c in collectives(program, mesh.shape, turns=turns)
            if c.axis != "tensor"  # that has a part of each product
        )
        for turns in (1.0, 100.0)
    ]
    assert sent[1] == sent[0] > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_fetched_in_the_dtype_of_the_arithmetic(tied):
    mesh = helpers.mesh_of(1, 4, 1)
    settings = {"tie_word_embeddings": tied, "vocab_size": 5000, "compute_dtype": jnp.bfloat16}
    model = helpers.tiny(mesh=mesh, **settings)
    batch = jax.device_put(helpers.random_batch(rows=4, seq=16), tj.parallel.rows(mesh))
    loss = tj.losses.sft(tj.policy(model))
    gradient = jax.jit(
        jax.grad(lambda params: loss(params, batch, None)[0]),
        compiler_options=platform.compiler_options(),
    )
    program = gradient.lower(model.params).compile().as_text()
    fetched = re.findall(r"(\w+)\[(?:5000,32|32,5000)\]\S* all-gather", program)
    assert set(fetched) == {"bf16"}


@pytest.mark.parametrize(
    "names",
    [
        ("norm", "head"),
        pytest.param(("embed", "layers", "norm", "head"), marks=pytest.mark.slow),
    ],
    ids=["last", "all"],
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_goes_through_the_head_at_once_changes_no_value(trained, names, monkeypatch):
    model = helpers.tiny()
    policy = tj.policy(model)
    batch = jax.tree.map(jnp.asarray, helpers.random_batch(rows=2, seq=10))

    def gradient(size):
        monkeypatch.setattr(policies, "tile", lambda platform: size)
        stopped = (lambda p: p) if trained else jax.lax.stop_gradient

        def loss(some):
            params = model.params | some | {"head": stopped(some["head"])}
            return policy(params, batch).logprobs.sum()

        some = {name: model.params[name] for name in names}
        return jax.jit(jax.value_and_grad(loss))(some)

    own, others = gradient(tile("cpu")), gradient(tile("gpu"))
    chex.assert_trees_all_close(own, others, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(own, gradient(Tile(3, 7)), rtol=1e-5, atol=1e-5)
