"""Chunked log-probabilities against the plain form, `log_softmax` of all the logits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.ops.vocab import Tied, logits, token_stats
from trainjax.peft import Lora

BATCH, SEQ, EMBED, VOCAB = 4, 6, 8, 50


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def untied(w, a, b):
    return w


def tied(w, a, b):
    return Tied(w.T)


def with_lora(w, a, b):
    return Lora(w, a, b, jnp.float32(0.5))


def plain_matrix(kind, w, a, b):
    return w + (a @ b) * 0.5 if kind is with_lora else w


@pytest.fixture
def problem():
    """Hidden states, the head's parts, targets, which are asked for, and the cotangents."""
    rng = np.random.default_rng(0)
    return {
        "hidden": random(BATCH, SEQ, EMBED),
        "parts": (random(EMBED, VOCAB), random(EMBED, 3), random(3, VOCAB)),
        "targets": rng.integers(0, VOCAB, (BATCH, SEQ), np.int32),
        "where": rng.random((BATCH, SEQ)) < 0.6,
        "cotangents": (random(BATCH, SEQ, seed=1), random(BATCH, SEQ, seed=2)),
    }


def plain(kind, hidden, parts, targets, where):
    """The definition. Only for tests: it makes all the logits."""
    scores = hidden @ plain_matrix(kind, *parts)
    lse = jax.scipy.special.logsumexp(scores, axis=-1)
    target = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(scores, axis=-1) == targets).astype(scores.dtype)
    return tuple(jnp.where(where, stat, 0.0) for stat in (target - lse, lse, correct))


def weighted(stats, cotangents):
    """A scalar whose gradient carries the cotangents of both differentiable outputs."""
    return sum(jnp.sum(stat * g) for stat, g in zip(stats, cotangents, strict=False))


def as_jax(x):
    return jax.tree.map(jnp.asarray, x)


def stats_of(kind, problem, **settings):
    args = as_jax((problem["hidden"], kind(*as_jax(problem["parts"]))))
    return token_stats(*args, *as_jax((problem["targets"], problem["where"])), **settings)


def gradients_of(kind, problem, trained: bool, **settings):
    """Gradients of the hidden states and, where the head is trained, of its parts."""
    targets, where, cotangents = as_jax(
        (problem["targets"], problem["where"], problem["cotangents"])
    )

    def f(hidden, parts):
        return weighted(
            token_stats(hidden, kind(*parts), targets, where, **settings), cotangents
        )

    argnums = (0, 1) if trained else (0,)
    return jax.jit(jax.grad(f, argnums))(*as_jax((problem["hidden"], problem["parts"])))


def expected_gradients(kind, problem, trained: bool):
    def f(hidden, parts, targets, where, cotangents):
        grad = jax.grad(
            lambda h, p: weighted(plain(kind, h, p, targets, where), cotangents),
            (0, 1) if trained else (0,),
        )
        return grad(hidden, parts)

    order = ("hidden", "parts", "targets", "where", "cotangents")
    return helpers.in_float64(f, *(problem[k] for k in order))


def assert_trees_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=tolerance)


HEADS = pytest.mark.parametrize("kind", [untied, tied, with_lora])
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
# 24 tokens and 50 entries: sizes that divide, that do not, that are above, and one by one.
SIZES = pytest.mark.parametrize(
    ("chunk", "vocab_block", "groups"),
    [(256, 2048, 1), (8, 25, 2), (7, 16, 1), (5, 13, 4), (1, 1, 1), (24, None, 1), (4, None, 2)],
)


@SIZES
@HEADS
def test_stats_are_those_of_log_softmax(kind, problem, chunk, vocab_block, groups):
    found = stats_of(kind, problem, chunk=chunk, vocab_block=vocab_block, groups=groups)
    order = ("hidden", "parts", "targets", "where")
    expected = helpers.in_float64(
        lambda *args: plain(kind, *args), *(problem[k] for k in order)
    )
    assert_trees_close(tuple(found), expected, 1e-5)


@SIZES
@TRAINED
@HEADS
def test_gradients_are_those_of_log_softmax(kind, problem, trained, chunk, vocab_block, groups):
    found = gradients_of(
        kind, problem, trained, chunk=chunk, vocab_block=vocab_block, groups=groups
    )
    assert_trees_close(found, expected_gradients(kind, problem, trained), 2e-5)


@pytest.mark.parametrize("asked", [True, False], ids=["all", "none"])
@TRAINED
@HEADS
def test_any_number_of_tokens_may_be_asked_for(kind, problem, trained, asked):
    problem["where"] = np.full((BATCH, SEQ), asked)
    found = gradients_of(kind, problem, trained, chunk=7, vocab_block=16)
    assert_trees_close(found, expected_gradients(kind, problem, trained), 2e-5)


@HEADS
def test_tokens_not_asked_for_are_zero_and_get_zero_gradient(kind, problem):
    unasked = ~problem["where"]
    stats = stats_of(kind, problem, chunk=7)
    (d_hidden, *_) = gradients_of(kind, problem, False, chunk=7)
    for array in (*stats, d_hidden):
        assert not np.any(np.asarray(array)[unasked])


@pytest.mark.parametrize("chunk", [1, 7, 256])
@TRAINED
@HEADS
def test_nan_states_of_tokens_not_asked_for_reach_nothing(kind, problem, trained, chunk):
    clean = stats_of(kind, problem), gradients_of(kind, problem, trained)
    problem["hidden"] = np.where(problem["where"][..., None], problem["hidden"], np.nan)
    stats = stats_of(kind, problem, chunk=chunk)
    gradients = gradients_of(kind, problem, trained, chunk=chunk)
    assert_trees_close((stats, gradients), clean, 1e-5)


@TRAINED
@HEADS
def test_bf16_states_give_float32_stats_within_the_rounding_of_the_inputs(kind, problem, trained):
    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(jnp.bfloat16))

    # The states are exact in bf16, and so is the frozen matrix: what is left is the arithmetic, of
    # which only probabilities and factors are rounded (relative error 2^-9 each).
    problem["hidden"] = rounded(problem["hidden"])
    problem["parts"] = jax.tree.map(lambda x: rounded(x).astype(np.float32), problem["parts"])
    stats = stats_of(kind, problem)
    assert {stat.dtype for stat in stats} == {jnp.dtype(jnp.float32)}
    order = ("hidden", "parts", "targets", "where")
    expected = helpers.in_float64(
        lambda *args: plain(kind, *args), *(problem[k] for k in order)
    )
    tolerance = 0.1 if kind is with_lora else 1e-4  # a Lora's product comes out in bf16
    assert_trees_close((stats.logprobs, stats.logsumexp), expected[:2], tolerance)
    gradients = gradients_of(kind, problem, trained)
    assert gradients[0].dtype == jnp.bfloat16
    for found, wanted in zip(
        jax.tree.leaves(gradients),
        jax.tree.leaves(expected_gradients(kind, problem, trained)),
        strict=True,
    ):
        error = np.abs(np.asarray(found, np.float64) - wanted).max()
        assert error < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_lose_the_target(problem, size):
    problem["parts"] = (size * problem["parts"][0], *problem["parts"][1:])
    stats = stats_of(untied, problem, vocab_block=16)
    order = ("hidden", "parts", "targets", "where")
    expected = helpers.in_float64(
        lambda *args: plain(untied, *args), *(problem[k] for k in order)
    )
    np.testing.assert_allclose(stats.logprobs, expected[0], rtol=1e-5, atol=0.05)


def programs(kind, trained: bool):
    """Loss and gradient over 512 tokens and 1024 entries, as something to trace or compile."""
    tokens, vocab = 512, 1024
    where = jnp.ones((4, tokens // 4), bool)
    targets = jnp.zeros((4, tokens // 4), jnp.int32)

    def f(hidden, parts):
        stats = token_stats(hidden, kind(*parts), targets, where, chunk=32, vocab_block=128)
        return jnp.sum(stats.logprobs)

    args = jnp.zeros((4, tokens // 4, EMBED)), (
        jnp.zeros((EMBED, vocab)),
        jnp.zeros((EMBED, 2)),
        jnp.zeros((2, vocab)),
    )
    return jax.value_and_grad(f, (0, 1) if trained else 0), args, tokens * vocab


@TRAINED
@HEADS
def test_no_array_of_tokens_by_vocabulary_is_made(kind, trained):
    f, args, forbidden = programs(kind, trained)
    shapes = helpers.shapes_in(jax.make_jaxpr(f)(*args).jaxpr)
    assert (4, 128, EMBED) in shapes  # the walk does see inner programs
    # A Lora cannot be cut along the vocabulary: a chunk of it, 1/16 of the whole, is the largest.
    assert max(int(np.prod(shape)) for shape in shapes) <= forbidden // 16


@TRAINED
@pytest.mark.parametrize("kind", [untied, tied])
def test_compiled_program_needs_a_small_part_of_the_memory_of_all_logits(kind, trained):
    f, args, forbidden = programs(kind, trained)
    temporary = jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < forbidden * 4 / 8


def test_dropout_in_a_lora_head_has_a_gradient():
    """A head that an adapter's `target` matches gets a key in training, as every matrix does."""
    keys = jax.random.key(0)
    hidden, w = jnp.asarray(random(1, 4, EMBED)), jnp.asarray(random(EMBED, VOCAB))
    a, b = jnp.asarray(random(EMBED, 3)), jnp.asarray(random(3, VOCAB))
    targets, where = jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), bool)

    def f(factors):
        head = Lora(w, *factors, jnp.float32(1.0), keys, dropout=0.5)
        return jnp.sum(token_stats(hidden, head, targets, where).logprobs)

    found = jax.grad(f)((a, b))
    assert all(bool(jnp.all(jnp.isfinite(g))) and bool(jnp.any(g != 0)) for g in found)


def test_tied_head_is_the_transpose_of_the_embedding():
    x, table = jnp.asarray(random(5, EMBED)), jnp.asarray(random(VOCAB, EMBED))
    np.testing.assert_array_equal(x @ Tied(table), x @ table.T)
    assert Tied(table).shape == (EMBED, VOCAB)


@HEADS
def test_logits_are_hidden_states_times_the_head_in_float32(kind, problem):
    hidden = jnp.asarray(problem["hidden"]).astype(jnp.bfloat16)
    found = logits(hidden, jax.tree.map(lambda x: x.astype(jnp.bfloat16), untied(*as_jax(problem["parts"]))))
    assert found.dtype == jnp.float32
    exact = logits(jnp.asarray(problem["hidden"]), kind(*as_jax(problem["parts"])))
    expected = problem["hidden"] @ plain_matrix(kind, *problem["parts"])
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5)
