"""Chunked log-probabilities against the plain form, `log_softmax` of all the logits, in float64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.ops.vocab import Tied, logits, token_stats
from trainjax.peft import Lora

BATCH, SEQ, EMBED, VOCAB, RANK = 4, 6, 8, 50, 3
SCALE = 0.5  # of the Lora; exact in every dtype


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def untied(w, a, b):
    return w


def tied(w, a, b):
    return Tied(w.T)


def with_lora(w, a, b):
    return Lora(w, a, b, jnp.float32(SCALE))


class Problem(NamedTuple):
    """Hidden states, the head's parts, targets, which are asked for, and cotangents of both outputs."""

    hidden: np.ndarray
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    targets: np.ndarray
    where: np.ndarray
    cotangents: tuple[np.ndarray, np.ndarray]


@pytest.fixture
def problem() -> Problem:
    rng = np.random.default_rng(0)
    return Problem(
        hidden=random(BATCH, SEQ, EMBED),
        parts=(random(EMBED, VOCAB), random(EMBED, RANK), random(RANK, VOCAB)),
        targets=rng.integers(0, VOCAB, (BATCH, SEQ), np.int32),
        where=rng.random((BATCH, SEQ)) < 0.6,
        cotangents=(random(BATCH, SEQ, seed=1), random(BATCH, SEQ, seed=2)),
    )


class Answer(NamedTuple):
    logprobs: Any
    logsumexp: Any
    correct: Any
    d_hidden: Any
    d_parts: tuple[Any, Any, Any]


def exact(kind, problem: Problem) -> Answer:
    """All the logits, in float64. With p the softmax and z the logits,
    `d logp(t) / dz = onehot(t) - p` and `d logsumexp / dz = p`; the rest is the chain rule.
    """
    x, (w, a, b) = problem.hidden.astype(np.float64), problem.parts
    w, a, b = (m.astype(np.float64) for m in (w, a, b))
    matrix = w + SCALE * a @ b if kind is with_lora else w
    z = x @ matrix
    lse = np.logaddexp.reduce(z, axis=-1)
    p = np.exp(z - lse[..., None])
    hot = np.eye(VOCAB)[problem.targets]
    g_logp, g_lse = (np.where(problem.where, g, 0.0)[..., None] for g in problem.cotangents)
    dz = g_logp * (hot - p) + g_lse * p
    dw = np.einsum("bse,bsv->ev", x, dz)
    no = np.zeros
    factors = (
        (SCALE * dw @ b.T, SCALE * a.T @ dw) if kind is with_lora else (no(a.shape), no(b.shape))
    )
    stats = ((z * hot).sum(-1) - lse, lse, z.argmax(-1) == problem.targets)
    return Answer(*(np.where(problem.where, s, 0.0) for s in stats), dz @ matrix.T, (dw, *factors))


def computed(
    kind,
    problem: Problem,
    trained: bool = False,
    chunk: int = 7,
    vocab_block: int | None = 16,
    groups: int = 1,
) -> Answer:
    """The same by `token_stats`; without gradients of the head's parts where it is frozen."""
    stats, grads = program(kind, trained, chunk, vocab_block, groups)(problem)
    return Answer(*stats, *grads, *(() if trained else ((),)))


@functools.cache  # compiling is what these tests spend their time on
def program(kind, trained: bool, chunk: int, vocab_block: int | None, groups: int):
    @jax.jit
    def run(problem):
        hidden, parts, targets, where, cotangents = problem

        def f(hidden, parts):
            stats = token_stats(
                hidden,
                kind(*parts),
                targets,
                where,
                chunk=chunk,
                vocab_block=vocab_block,
                groups=groups,
            )
            return sum(jnp.sum(s * g) for s, g in zip(stats, cotangents, strict=False)), stats

        grads, stats = jax.grad(f, (0, 1) if trained else (0,), has_aux=True)(hidden, parts)
        return stats, grads

    return run


def assert_answers_close(found: Answer, expected: Answer, tolerance: float) -> None:
    for name, a, e in zip(Answer._fields, found, expected, strict=True):
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(e), strict=False):
            np.testing.assert_allclose(
                np.asarray(one, np.float64), other, rtol=0, atol=tolerance, err_msg=name
            )


HEADS = pytest.mark.parametrize("kind", [untied, tied, with_lora])
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


# 24 tokens and 50 entries: sizes above both, that divide, that do not, one by one, no blocks. A Lora is
# never cut along the vocabulary.
@pytest.mark.parametrize(
    ("kind", "chunk", "vocab_block", "groups"),
    [
        *((kind, 7, 16, 1) for kind in (untied, tied, with_lora)),
        (untied, 256, 2048, 1),
        (tied, 8, 25, 2),
        (untied, 1, 1, 4),
        (tied, 4, None, 2),
        (with_lora, 8, None, 2),
    ],
)
@TRAINED
def test_values_and_gradients_are_those_of_log_softmax(
    kind, problem, trained, chunk, vocab_block, groups
):
    found = computed(kind, problem, trained, chunk, vocab_block, groups)
    assert_answers_close(found, exact(kind, problem), 2e-5)


@pytest.mark.parametrize("asked", [True, False], ids=["all", "none"])
@TRAINED
@pytest.mark.parametrize("kind", [untied, tied])
def test_all_or_none_of_the_tokens_may_be_asked_for(kind, problem, trained, asked):
    problem = problem._replace(where=np.full((BATCH, SEQ), asked))
    found = computed(kind, problem, trained)
    assert_answers_close(found, exact(kind, problem), 2e-5)


@HEADS
def test_tokens_not_asked_for_are_zero_and_get_zero_gradient(kind, problem):
    found = computed(kind, problem)
    for array in found[:4]:
        assert not np.any(np.asarray(array)[~problem.where])


@TRAINED
@HEADS
def test_nan_states_of_tokens_not_asked_for_reach_nothing(kind, problem, trained):
    """They share chunks with tokens that are asked for."""
    hidden = np.where(problem.where[..., None], problem.hidden, np.nan)
    found = computed(kind, problem._replace(hidden=hidden), trained)
    assert_answers_close(found, exact(kind, problem), 2e-5)


@pytest.mark.parametrize(("kind", "trained"), [(untied, False), (tied, True), (with_lora, True)])
def test_bf16_states_lose_no_more_than_the_rounding_of_probabilities_and_factors(
    kind, problem, trained
):
    """The states and the frozen matrix are exact in bf16 here, so what is left is the arithmetic."""

    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(jnp.bfloat16))

    parts = tuple(rounded(part).astype(np.float32) for part in problem.parts)
    problem = problem._replace(hidden=rounded(problem.hidden), parts=parts)
    found, expected = computed(kind, problem, trained), exact(kind, problem)
    assert {found.logprobs.dtype, found.logsumexp.dtype} == {jnp.dtype(jnp.float32)}
    assert found.d_hidden.dtype == jnp.bfloat16
    # A Lora's product comes out in bf16: logits up to 16 are rounded by up to 2^-9 * 16, twice.
    tolerance = 0.07 if kind is with_lora else 1e-4
    assert_answers_close(Answer(*found[:2], (), (), ()), expected, tolerance)
    for one, other in zip(jax.tree.leaves(found[3:]), jax.tree.leaves(expected[3:]), strict=False):
        error = np.abs(np.asarray(one, np.float64) - other).max()
        assert error <= 0.02 * np.abs(other).max()


@pytest.mark.parametrize("kind", [untied, tied])
def test_large_logits_neither_overflow_nor_lose_the_target(kind, problem):
    problem = problem._replace(parts=(1e4 * problem.parts[0], *problem.parts[1:]))
    found, expected = computed(kind, problem), exact(kind, problem)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=0.05)
    np.testing.assert_array_equal(found.correct, expected.correct)


def programs(kind, trained: bool):
    """Loss and gradient over 512 tokens and 1024 entries, as something to trace or compile."""
    tokens, vocab = 512, 1024
    where = jnp.ones((4, tokens // 4), bool)
    targets = jnp.zeros((4, tokens // 4), jnp.int32)

    def f(hidden, parts):
        stats = token_stats(hidden, kind(*parts), targets, where, chunk=32, vocab_block=128)
        return jnp.sum(stats.logprobs)

    args = (
        jnp.zeros((4, tokens // 4, EMBED)),
        (
            jnp.zeros((EMBED, vocab)),
            jnp.zeros((EMBED, 2)),
            jnp.zeros((2, vocab)),
        ),
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


def test_a_lora_head_with_dropout_trains():
    """A head that an adapter's `target` matches gets a key in training, as every matrix does."""
    hidden, w = jnp.asarray(random(1, 4, EMBED)), jnp.asarray(random(EMBED, VOCAB))
    targets, where = jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), bool)

    @jax.jit
    @jax.grad
    def gradient(factors):
        head = Lora(w, *factors, jnp.float32(1.0), jax.random.key(0), dropout=0.5)
        return jnp.sum(token_stats(hidden, head, targets, where).logprobs)

    found = gradient((random(EMBED, RANK), random(RANK, VOCAB)))
    assert all(bool(jnp.all(jnp.isfinite(g))) and bool(jnp.any(g != 0)) for g in found)


def test_tied_head_is_the_transpose_of_the_embedding():
    x, table = random(5, EMBED), random(VOCAB, EMBED)
    found = jnp.asarray(x) @ Tied(jnp.asarray(table))
    np.testing.assert_allclose(found, x.astype(np.float64) @ table.T, rtol=0, atol=1e-5)
    assert Tied(jnp.asarray(table)).shape == (EMBED, VOCAB)


@HEADS
def test_logits_are_states_times_head_in_float32(kind, problem):
    head = kind(*map(jnp.asarray, problem.parts))
    found = logits(jnp.asarray(problem.hidden), head)
    w, a, b = problem.parts
    matrix = w + SCALE * a @ b if kind is with_lora else w
    np.testing.assert_allclose(found, problem.hidden @ matrix, rtol=0, atol=1e-5)
    assert logits(jnp.asarray(problem.hidden, jnp.bfloat16), head).dtype == jnp.float32
