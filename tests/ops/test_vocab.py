"""Chunked log-probabilities against the plain form, `log_softmax` of all the logits, in float64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.ops.head import Tied, logits
from trainjax.ops.vocab import NO_EXTRAS, Extras, TokenStats, token_stats
from trainjax.peft import Lora

BATCH, SEQ, EMBED, VOCAB, RANK = 4, 6, 8, 50, 3
SCALE = 0.5  # of the Lora; exact in every dtype
ALL = Extras(entropy=True, mean_logit=True, collision=True)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def untied(w, a, b):
    return w


def tied(w, a, b):
    return Tied(w.T)


def with_lora(w, a, b):
    return Lora(w, a, b, jnp.float32(SCALE))


class Problem(NamedTuple):
    """Hidden states, the head's parts, targets, which are asked for, and cotangents of what has a
    gradient: log-probabilities, logsumexp, entropy and mean logit.
    """

    hidden: np.ndarray
    parts: tuple[np.ndarray, np.ndarray, np.ndarray]
    targets: np.ndarray
    where: np.ndarray
    cotangents: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def problem() -> Problem:
    rng = np.random.default_rng(0)
    return Problem(
        hidden=random(BATCH, SEQ, EMBED),
        parts=(random(EMBED, VOCAB), random(EMBED, RANK), random(RANK, VOCAB)),
        targets=rng.integers(0, VOCAB, (BATCH, SEQ), np.int32),
        where=rng.random((BATCH, SEQ)) < 0.6,
        cotangents=tuple(random(BATCH, SEQ, seed=seed) for seed in (1, 2, 3, 4)),
    )


class Answer(NamedTuple):
    stats: TokenStats
    d_hidden: Any
    d_parts: tuple[Any, Any, Any]


def exact(kind, problem: Problem, extras: Extras = NO_EXTRAS) -> Answer:
    """All the logits, in float64. With p the softmax and z the logits: `d logp(t) / dz = onehot(t) - p`,
    `d logsumexp / dz = p`, `dH / dz = -p (log p + H)`, `d mean / dz = 1 / V`; then the chain rule.
    """
    x, (w, a, b) = problem.hidden.astype(np.float64), problem.parts
    w, a, b = (m.astype(np.float64) for m in (w, a, b))
    matrix = w + SCALE * a @ b if kind is with_lora else w
    z = x @ matrix
    lse = np.logaddexp.reduce(z, axis=-1)
    logp = z - lse[..., None]
    p, hot = np.exp(logp), np.eye(VOCAB)[problem.targets]
    entropy = -(p * logp).sum(-1)
    g_logp, g_lse, g_entropy, g_mean = (
        np.where(problem.where, g, 0.0)[..., None] for g in problem.cotangents
    )
    dz = g_logp * (hot - p) + g_lse * p
    if extras.entropy:
        dz -= g_entropy * p * (logp + entropy[..., None])
    if extras.mean_logit:
        dz += g_mean / VOCAB
    dw = np.einsum("bse,bsv->ev", x, dz)
    no = np.zeros
    factors = (
        (SCALE * dw @ b.T, SCALE * a.T @ dw) if kind is with_lora else (no(a.shape), no(b.shape))
    )
    stats = TokenStats(
        (logp * hot).sum(-1),
        lse,
        z.argmax(-1) == problem.targets,
        entropy if extras.entropy else None,
        z.mean(-1) if extras.mean_logit else None,
        np.log((p**2).sum(-1)) if extras.collision else None,
    )
    masked = jax.tree.map(lambda stat: np.where(problem.where, stat, 0.0), stats)
    return Answer(masked, dz @ matrix.T, (dw, *factors))


def computed(
    kind,
    problem: Problem,
    trained: bool = False,
    chunk: int = 7,
    vocab_block: int | None = 16,
    groups: int = 1,
    extras: Extras = NO_EXTRAS,
) -> Answer:
    """The same by `token_stats`; without gradients of the head's parts where it is frozen."""
    stats, grads = program(kind, trained, chunk, vocab_block, groups, extras)(problem)
    return Answer(stats, *grads, *(() if trained else ((),)))


@functools.cache  # compiling is what these tests spend their time on
def program(kind, trained: bool, chunk: int, vocab_block: int | None, groups: int, extras: Extras):
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
                extras=extras,
            )
            differentiable = (stats.logprobs, stats.logsumexp, stats.entropy, stats.mean_logit)
            pairs = [
                (s, g) for s, g in zip(differentiable, cotangents, strict=True) if s is not None
            ]
            return sum(jnp.sum(s * g) for s, g in pairs), stats

        grads, stats = jax.grad(f, (0, 1) if trained else (0,), has_aux=True)(hidden, parts)
        return stats, grads

    return run


def assert_answers_close(found: Answer, expected: Answer, tolerance: float) -> None:
    """A frozen head has no gradients to compare."""
    assert [s is None for s in found.stats] == [s is None for s in expected.stats]
    expected = expected._replace(d_parts=expected.d_parts[: len(found.d_parts)])
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), e, rtol=0, atol=tolerance, err_msg=name
        )


HEADS = [untied, tied, with_lora]
KIND = pytest.mark.parametrize("kind", HEADS)
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


# 24 tokens and 50 entries: sizes above both, that divide, that do not, one by one, no blocks. A Lora is
# never cut along the vocabulary. Each way of cutting is asked about with a head that is frozen or one that
# trains, and without the extras or, below, with all of them.
@pytest.mark.parametrize(
    ("kind", "trained", "chunk", "vocab_block", "groups"),
    [
        *((kind, trained, 7, 16, 1) for kind in HEADS for trained in (False, True)),
        (untied, False, 256, 2048, 1),
        (tied, True, 4, None, 2),
    ],
)
def test_values_and_gradients_are_those_of_log_softmax(
    kind, problem, trained, chunk, vocab_block, groups
):
    found = computed(kind, problem, trained, chunk, vocab_block, groups)
    assert_answers_close(found, exact(kind, problem), 2e-5)


@pytest.mark.parametrize(
    ("kind", "trained", "chunk", "vocab_block", "groups", "extras"),
    [
        *((kind, trained, 7, 16, 1, ALL) for kind in HEADS for trained in (False, True)),
        (tied, True, 8, 25, 2, ALL),
        (untied, False, 1, 1, 4, ALL),
        (with_lora, True, 8, None, 2, ALL),
        (untied, False, 7, 16, 1, Extras(entropy=True)),
        (untied, True, 7, 16, 1, Extras(entropy=True)),
        (untied, True, 7, 16, 1, Extras(mean_logit=True)),
        (untied, False, 7, 16, 1, Extras(collision=True)),
    ],
)
def test_extras_and_their_gradients_are_those_of_all_the_logits(
    kind, problem, trained, chunk, vocab_block, groups, extras
):
    found = computed(kind, problem, trained, chunk, vocab_block, groups, extras)
    assert_answers_close(found, exact(kind, problem, extras), 2e-5)


def test_of_a_uniform_distribution_entropy_and_collision_are_the_logarithm_of_its_size(problem):
    problem = problem._replace(hidden=np.zeros_like(problem.hidden))
    stats = computed(untied, problem, extras=ALL).stats
    for found in (stats.entropy, -stats.collision, stats.logsumexp - stats.mean_logit):
        np.testing.assert_allclose(found[problem.where], np.log(VOCAB), rtol=1e-6)


def test_the_collision_has_no_gradient(problem):
    @jax.jit
    @jax.grad
    def gradient(hidden):
        head, targets, where = map(jnp.asarray, (problem.parts[0], problem.targets, problem.where))
        return jnp.sum(token_stats(hidden, head, targets, where, extras=ALL).collision)

    assert not gradient(jnp.asarray(problem.hidden)).any()


@pytest.mark.parametrize("asked", [True, False], ids=["all", "none"])
@TRAINED
@pytest.mark.parametrize("kind", [untied, tied])
def test_all_or_none_of_the_tokens_may_be_asked_for(kind, problem, trained, asked):
    problem = problem._replace(where=np.full((BATCH, SEQ), asked))
    found = computed(kind, problem, trained, extras=ALL)
    assert_answers_close(found, exact(kind, problem, ALL), 2e-5)


@KIND
def test_tokens_not_asked_for_are_zero_and_get_zero_gradient(kind, problem):
    found = computed(kind, problem, extras=ALL)
    for array in (*found.stats, found.d_hidden):
        assert not np.any(np.asarray(array)[~problem.where])


@TRAINED
@KIND
def test_nan_states_of_tokens_not_asked_for_reach_nothing(kind, problem, trained):
    """They share chunks with tokens that are asked for."""
    hidden = np.where(problem.where[..., None], problem.hidden, np.nan)
    found = computed(kind, problem._replace(hidden=hidden), trained, extras=ALL)
    assert_answers_close(found, exact(kind, problem, ALL), 2e-5)


@pytest.mark.parametrize(("kind", "trained"), [(untied, False), (tied, True), (with_lora, True)])
def test_bf16_states_lose_no_more_than_the_rounding_of_probabilities_and_factors(
    kind, problem, trained
):
    """The states and the frozen matrix are exact in bf16 here, so what is left is the arithmetic."""

    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(jnp.bfloat16))

    parts = tuple(rounded(part).astype(np.float32) for part in problem.parts)
    problem = problem._replace(hidden=rounded(problem.hidden), parts=parts)
    found = computed(kind, problem, trained, extras=ALL)
    expected = exact(kind, problem, ALL)
    stats = found.stats._replace(correct=None)
    assert {stat.dtype for stat in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
    assert found.d_hidden.dtype == jnp.bfloat16
    # A Lora's product comes out in bf16: logits up to 16 are rounded by up to 2^-9 * 16, twice.
    tolerance = 0.07 if kind is with_lora else 1e-4
    values = Answer(stats, (), ()), Answer(expected.stats._replace(correct=None), (), ())
    assert_answers_close(*values, tolerance)
    for one, other in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(expected[1:]), strict=False):
        error = np.abs(np.asarray(one, np.float64) - other).max()
        assert error <= 0.02 * np.abs(other).max()


@pytest.mark.parametrize("kind", [untied, tied])
def test_large_logits_neither_overflow_nor_lose_the_target(kind, problem):
    problem = problem._replace(parts=(1e4 * problem.parts[0], *problem.parts[1:]))
    found, expected = computed(kind, problem), exact(kind, problem)
    np.testing.assert_allclose(found.stats.logprobs, expected.stats.logprobs, rtol=1e-5, atol=0.05)
    np.testing.assert_array_equal(found.stats.correct, expected.stats.correct)


@TRAINED
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_extras_of_large_logits_are_finite_and_right(problem, trained, scale):
    """The whole mass is on one entry: no entropy, every two draws agree, and nothing to move."""
    problem = problem._replace(parts=(np.float32(scale) * problem.parts[0], *problem.parts[1:]))
    found, expected = computed(untied, problem, trained, extras=ALL), exact(untied, problem, ALL)
    for name in ("entropy", "collision"):
        value, right = getattr(found.stats, name), getattr(expected.stats, name)
        np.testing.assert_allclose(value, right, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        found.stats.mean_logit, expected.stats.mean_logit, rtol=0, atol=1e-6 * scale
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def programs(kind, trained: bool, extras: Extras = ALL):
    """Loss and gradient over 512 tokens and 1024 entries, as something to trace or compile."""
    tokens, vocab = 512, 1024
    where = jnp.ones((4, tokens // 4), bool)
    targets = jnp.zeros((4, tokens // 4), jnp.int32)

    def f(hidden, parts):
        blocks = {"chunk": 32, "vocab_block": 128}
        stats = token_stats(hidden, kind(*parts), targets, where, **blocks, extras=extras)
        return sum(jnp.sum(stat) for stat in jax.tree.leaves(stats))

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
@KIND
def test_no_array_of_tokens_by_vocabulary_is_made(kind, trained):
    """And where a head is cut along the vocabulary, the compiled program needs a small part of its memory."""
    f, args, forbidden = programs(kind, trained)
    program = jax.jit(f).trace(*args)
    shapes = helpers.shapes_in(program.jaxpr)
    assert (4, 128, EMBED) in shapes  # the walk does see inner programs
    # A Lora cannot be cut along the vocabulary: a chunk of it, 1/16 of the whole, is the largest.
    assert max(int(np.prod(shape)) for shape in shapes) <= forbidden // 16
    if kind is not with_lora:
        memory = program.lower().compile().memory_analysis()
        assert memory.temp_size_in_bytes < forbidden * 4 / 8


@TRAINED
def test_what_is_not_asked_for_costs_no_product_with_the_head(trained):
    """Of the extras only a gradient of the entropy through a frozen head takes one more."""

    def products(extras: Extras) -> int:
        f, args, _ = programs(untied, trained, extras)
        return str(jax.make_jaxpr(f)(*args)).count("dot_general")

    plain = products(NO_EXTRAS)
    assert products(Extras(collision=True)) == plain
    assert products(Extras(entropy=True)) == plain + (0 if trained else 1)


def test_a_lora_head_with_dropout_trains():
    """A head that an adapter's `target` matches gets a key in training, as every matrix does."""
    hidden, w = jnp.asarray(random(1, 4, EMBED)), jnp.asarray(random(EMBED, VOCAB))
    targets, where = jnp.arange(4, dtype=jnp.int32)[None], jnp.ones((1, 4), bool)

    @jax.jit
    @jax.grad
    def gradient(factors):
        head = Lora(w, *factors, jnp.float32(1.0), jax.random.key(0), dropout=0.5)
        stats = token_stats(hidden, head, targets, where, extras=ALL)
        return jnp.sum(stats.logprobs + stats.entropy + stats.mean_logit)

    found = gradient((random(EMBED, RANK), random(RANK, VOCAB)))
    assert all(bool(jnp.all(jnp.isfinite(g))) and bool(jnp.any(g != 0)) for g in found)


def test_tied_head_is_the_transpose_of_the_embedding():
    x, table = random(5, EMBED), random(VOCAB, EMBED)
    found = jnp.asarray(x) @ Tied(jnp.asarray(table))
    np.testing.assert_allclose(found, x.astype(np.float64) @ table.T, rtol=0, atol=1e-5)
    assert Tied(jnp.asarray(table)).shape == (EMBED, VOCAB)


@KIND
def test_logits_are_states_times_head_in_float32(kind, problem):
    head = kind(*map(jnp.asarray, problem.parts))
    found = logits(jnp.asarray(problem.hidden), head)
    w, a, b = problem.parts
    matrix = w + SCALE * a @ b if kind is with_lora else w
    np.testing.assert_allclose(found, problem.hidden @ matrix, rtol=0, atol=1e-5)
    assert logits(jnp.asarray(problem.hidden, jnp.bfloat16), head).dtype == jnp.float32
