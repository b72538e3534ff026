"""Attention by blocks, by the splash kernel and against a cache: all are the dense formula in float64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.ops.attention import _cudnn_refuses, _splash_refuses, attend, splash
from trainjax.ops.blocked import Branches, Prefix, attend_cache, blocked


class Case(NamedTuple):
    """Shapes and options of one call; `segments` asks for rows of several examples with padding."""

    batch: int = 2
    seq: int = 20
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    segments: bool = False
    window: int | None = None


def inputs(case: Case, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """Query, key, value and the output's cotangent; segments; all random."""
    rng = np.random.default_rng(case.seq)

    def random(heads):
        values = rng.standard_normal((case.batch, case.seq, heads, case.dim))
        return np.asarray(jnp.asarray(values, dtype))

    arrays = tuple(random(n) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads))
    if not case.segments:
        return *arrays, None
    ids = np.sort(rng.integers(1, 4, (case.batch, case.seq), np.int32), axis=1)
    ids[-1, -3:] = 0
    return *arrays, ids


def visible(case: Case, segments: np.ndarray | None) -> np.ndarray:
    """`[batch, query, key]`: not later, not older than the window, of the same segment."""
    at = np.arange(case.seq)
    age = at[:, None] - at[None, :]
    seen = np.broadcast_to(age >= 0, (case.batch, case.seq, case.seq))
    if case.window is not None:
        seen = seen & (age < case.window)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return seen


def dense(case: Case, q, k, v, g, segments) -> tuple[np.ndarray, ...]:
    """Output, and gradients of query, key and value. With P the softmax and O the output,
    `dV = P^T g`, `dS = P * (g V^T - sum(g * O))`, `dQ = dS K / sqrt(d)`, `dK = dS^T Q / sqrt(d)`.
    """
    q, k, v, g = (x.astype(np.float64) for x in (q, k, v, g))
    group = case.heads // case.kv_heads
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, wide_k) / np.sqrt(case.dim)
    scores = np.where(visible(case, segments)[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", p, wide_v)
    dp = np.einsum("bqhd,bkhd->bhqk", g, wide_v)
    ds = p * (dp - np.einsum("bqhd,bqhd->bhq", g, out)[..., None]) / np.sqrt(case.dim)

    def summed(x):  # over the query heads that share a key head
        return x.reshape(case.batch, case.seq, case.kv_heads, group, case.dim).sum(3)

    dq = np.einsum("bhqk,bkhd->bqhd", ds, wide_k)
    dk = summed(np.einsum("bhqk,bqhd->bkhd", ds, q))
    dv = summed(np.einsum("bhqk,bqhd->bkhd", p, g))
    return out, dq, dk, dv


def with_gradients(f, q, k, v, g, segments) -> tuple[Any, ...]:
    def run(q, k, v, g, segments):
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)
        return out, *pull(g)

    return jax.jit(run)(q, k, v, g, segments)


def assert_all_close(found, expected, tolerance) -> None:
    for name, a, e in zip(("out", "query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, 0, tolerance, err_msg=name)


CASES = [
    (Case(), 128),  # one block
    (Case(), 6),  # the last block is shorter
    (Case(heads=4, kv_heads=4, segments=True), 5),
    (Case(heads=4, kv_heads=1, window=3), 7),  # a window narrower than a block
    (Case(window=9, segments=True), 4),  # and wider than one
    (Case(seq=1), 128),
]


@pytest.mark.parametrize(("case", "block"), CASES)
def test_blocked_attention_and_its_gradients_are_the_dense_formula(case, block):
    args = inputs(case)
    found = with_gradients(functools.partial(blocked, window=case.window, block=block), *args)
    assert_all_close(found, dense(case, *args), 1e-5)


def test_a_window_that_covers_the_row_changes_nothing():
    args = inputs(case := Case())
    found = with_gradients(functools.partial(blocked, window=case.seq, block=8), *args)
    assert_all_close(found, dense(case, *args), 1e-5)


def test_blocked_attention_in_bf16_sums_in_float32():
    case = Case(seq=64, segments=True, window=40)
    args = inputs(case, jnp.bfloat16)
    found = with_gradients(functools.partial(blocked, window=case.window, block=16), *args)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}
    # Probabilities and results are rounded once each: 2^-8 of values up to 4, over 64 random terms.
    assert_all_close(found, dense(case, *args), 0.05)


def test_a_long_row_takes_at_most_16_blocks():
    """Blocks are unrolled, so their number is the size of the program."""
    case = Case(batch=1, seq=512, heads=1, kv_heads=1, dim=2)
    q, k, v, *_ = inputs(case)
    program = jax.make_jaxpr(functools.partial(blocked, block=8))(q, k, v).jaxpr
    shapes = helpers.shapes_in(program)
    assert (1, 1, 32, 512) in shapes  # the last of 16 blocks of 32 queries
    assert all(np.prod(shape) < 512 * 512 for shape in shapes)


def test_padding_on_the_right_is_out_of_sight_without_segments():
    q, k, v, *_ = inputs(case := Case())
    real = 12
    padded = [
        np.concatenate([x[:, :real], np.full_like(x[:, real:], 1e6)], axis=1) for x in (q, k, v)
    ]
    whole, part = (
        blocked(*map(jnp.asarray, padded)),
        blocked(*(jnp.asarray(x[:, :real]) for x in (q, k, v))),
    )
    np.testing.assert_allclose(whole[:, :real], part, rtol=0, atol=1e-6)
    assert case.seq > real


def test_attend_on_cpu_is_blocked_attention():
    q, k, v, _, segments = inputs(Case(segments=True))
    np.testing.assert_array_equal(
        attend(*map(jnp.asarray, (q, k, v, segments)), window=5),
        blocked(*map(jnp.asarray, (q, k, v, segments)), window=5),
    )


SPLASH = Case(batch=1, seq=256, heads=2, kv_heads=1, dim=64)


@pytest.mark.parametrize(
    "case",
    [SPLASH._replace(segments=True), SPLASH._replace(window=100, seq=256)],
    ids=["segments", "window"],
)
def test_splash_attention_is_the_dense_formula(case):
    """The TPU kernel, interpreted."""
    args = inputs(case)
    attention = functools.partial(splash, window=case.window, interpret=True)
    found = jax.jit(attention)(*args[:3], args[4])
    assert_all_close((found,) * 4, (dense(case, *args)[0],) * 4, 1e-4)


def test_splash_attention_over_a_mesh_is_the_dense_formula():
    case = Case(batch=2, seq=128, heads=4, kv_heads=2, dim=64, segments=True)
    args = inputs(case)
    attention = functools.partial(splash, mesh=helpers.mesh_of(1, 2, 2), interpret=True)
    found = jax.jit(attention)(*args[:3], args[4])
    assert_all_close((found,) * 4, (dense(case, *args)[0],) * 4, 1e-4)


@pytest.mark.parametrize("new", [1, 3])
def test_attention_against_a_cache_is_that_of_the_last_tokens_of_the_whole_row(new):
    """Slots after the tokens are never visible, whatever they hold."""
    case = Case(seq=9, window=6)
    q, k, v, g, _ = inputs(case)
    free = np.full((case.batch, 4, case.kv_heads, case.dim), 1e9, np.float32)
    keys, values = (np.concatenate([x, free], axis=1).transpose(0, 2, 1, 3) for x in (k, v))
    seen = np.pad(visible(case, None), ((0, 0), (0, 0), (0, 4)))[:, -new:]
    found = attend_cache(*map(jnp.asarray, (q[:, -new:], keys, values, seen)))
    expected = dense(case, q, k, v, g, None)[0][:, -new:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_attention_against_a_bf16_cache_keeps_the_dtype_of_the_query():
    q, k, v, *_ = inputs(Case(seq=5), jnp.bfloat16)
    seen = np.ones((2, 1, 5), bool)
    found = attend_cache(
        jnp.asarray(q[:, -1:]),
        *(jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (k, v)),
        jnp.asarray(seen),
    )
    assert found.dtype == jnp.bfloat16


def test_completions_that_share_a_prompt_see_it_and_not_one_another():
    """`[prompt | one | other]` in a row is the dense formula on `[prompt | one]` and `[prompt | other]`."""
    case = Case(batch=1, seq=17)
    q, k, v, g = (x.copy() for x in inputs(case)[:4])
    prompt, one, other, rest = np.split(np.arange(17), [5, 9, 15])
    segments, prefixes = np.zeros((2, 1, 17), np.int32)
    for number, part in enumerate((prompt, one, other), 1):
        segments[0, part] = number
    prefixes[0, 5:15] = 1
    g[:, rest] = 0
    found = with_gradients(
        functools.partial(blocked, block=6), q, k, v, g, Branches(segments, prefixes)
    )
    total = [np.zeros(x.shape) for x in (q, q, k, v)]
    for branch in (one, other):
        rows = np.concatenate([prompt, branch])
        cotangent = g[:, rows].copy()
        cotangent[:, :5] *= branch is one  # the prompt's own outputs count once
        alone = dense(
            Case(batch=1, seq=len(rows)), *(x[:, rows] for x in (q, k, v)), cotangent, None
        )
        total[0][:, rows] = alone[0]
        for whole, part in zip(total[1:], alone[1:], strict=True):
            whole[:, rows] += part
    found = [np.asarray(x) for x in found]
    found[0] = found[0].copy()
    found[0][:, rest] = 0
    assert_all_close(found, total, 1e-5)


def test_a_window_cannot_be_had_with_shared_prompts():
    q, k, v, *_ = inputs(Case(batch=1))
    ids = np.ones((1, 20), np.int32)
    with pytest.raises(ValueError, match="sliding window of 3 tokens cannot see past"):
        attend(*map(jnp.asarray, (q, k, v)), Branches(*map(jnp.asarray, (ids, ids))), window=3)


@pytest.mark.parametrize(
    ("case", "block"),
    [
        (Case(), 128),
        (Case(heads=4, kv_heads=1, segments=True), 6),
        (Case(window=5, segments=True), 4),
        (Case(window=22), 7),  # wider than the row: of the prefix the last tokens still see a part
    ],
)
def test_a_prefix_is_the_first_tokens_of_each_example(case, block):
    """Output and gradients are those of rows of one example with the prefix written before it.

    The prefix's own gradients are the sum over all examples.
    """
    q, k, v, g, segments = inputs(case)
    count = 4
    keys, values = np.random.default_rng(5).standard_normal(
        (2, case.kv_heads, count, case.dim), np.float32
    )
    ids = np.ones((case.batch, case.seq), np.int32) if segments is None else segments
    starts = np.argmax(ids[:, :, None] == ids[:, None, :], axis=-1)
    positions = (count + np.arange(case.seq) - starts).astype(np.int32)

    @jax.jit
    def run(q, k, v, keys, values, g):
        def f(q, k, v, keys, values):
            prefix = Prefix(keys, values, None if case.window is None else jnp.asarray(positions))
            packed = None if segments is None else jnp.asarray(segments)
            return blocked(q, k, v, packed, prefix=prefix, window=case.window, block=block)

        out, pull = jax.vjp(f, q, k, v, keys, values)
        return out, *pull(g)

    found = run(q, k, v, keys, values, g)
    expected = [np.zeros(x.shape) for x in (q, q, k, v)]
    shared = [np.zeros((count, *x.shape[:1], case.dim)) for x in (keys, values)]
    for row, number in {(at, n) for at in range(case.batch) for n in ids[at].tolist()}:
        own = ids[row] == number
        first = [
            np.zeros((count, case.heads, case.dim)),
            *(x.swapaxes(0, 1) for x in (keys, values)),
        ]
        first.append(first[0])
        whole = [
            np.concatenate([part, x[row, own]])[None]
            for part, x in zip(first, (q, k, v, g), strict=True)
        ]
        alone = dense(case._replace(batch=1, seq=whole[0].shape[1]), *whole, None)
        for total, part in zip(expected, alone, strict=True):
            total[row, own] += part[0, count:]
        for total, part in zip(shared, alone[2:], strict=True):
            total += part[0, :count]
    assert_all_close(found[:4], expected, 1e-5)
    for a, e in zip(found[4:], shared, strict=True):
        np.testing.assert_allclose(np.asarray(a).swapaxes(0, 1), e, rtol=0, atol=2e-5)
    assert {a.dtype for a in found} == {jnp.dtype("float32")}


def test_the_gradient_of_a_prefix_is_summed_in_float32_under_bf16():
    """512 equal rows: a sum in bf16 would stop at 256 times the gradient of one."""
    case = Case(batch=1, seq=8)
    q, k, v, g, _ = (None if x is None else jnp.asarray(x) for x in inputs(case, jnp.bfloat16))
    keys, values = jnp.asarray(
        np.random.default_rng(5).standard_normal((2, case.kv_heads, 3, case.dim), np.float32)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(rows, q, k, v, g):
        q, k, v, g = (jnp.tile(x, (rows, 1, 1, 1)) for x in (q, k, v, g))
        f = lambda keys, values: blocked(q, k, v, prefix=Prefix(keys, values))  # noqa: E731
        return jax.vjp(f, keys, values)[1](g)

    for one, many in zip(gradients(1, q, k, v, g), gradients(512, q, k, v, g), strict=True):
        assert many.dtype == jnp.float32
        # Equal rows are rounded a little differently in programs of another size.
        assert np.linalg.norm(many - 512 * one) < 0.02 * np.linalg.norm(512 * one)


def test_kernels_of_accelerators_say_that_they_cannot_serve_a_prefix():
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    prefix = Prefix(jnp.zeros((1, 3, 64)), jnp.zeros((1, 3, 64)))
    assert not _splash_refuses(q, None, None)
    assert not _cudnn_refuses(q, "gpu", None)
    assert _splash_refuses(q, None, prefix) == _cudnn_refuses(q, "gpu", prefix) == "virtual tokens"
