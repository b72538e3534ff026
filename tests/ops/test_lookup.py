"""Rows of a table that devices share, against plain indexing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import helpers
from trainjax import axes, losses, parallel, policies
from trainjax.ops.lookup import lookup
from trainjax.parallel.collectives import collectives

MESHES = [
    {"fsdp": 4},
    {"fsdp": 1, "tensor": 4},
    {"data": 2, "fsdp": 2},
    {"fsdp": 2, "tensor": 2},
    {"slices": 2, "fsdp": 2},
    {"fsdp": 2, "expert": 2},
    {"fsdp": 2, "sequence": 2},
    {"data": 4, "fsdp": 1},
]


def problem(sizes, vocab=12, embed=8, rows=8, seq=6):
    """A mesh, a table, tokens and the result's cotangent, laid out as the decoder has them."""
    mesh = parallel.mesh(**sizes)
    parts = axes.length(mesh, "sequence")
    rng = np.random.default_rng(0)
    over = (*axes.rows(mesh), "sequence") if parts > 1 else axes.rows(mesh)
    table = rng.standard_normal((vocab, embed), np.float32)
    shared = parallel.spec("embed/embedding", table.shape, mesh)
    return (
        mesh,
        parts,
        jax.device_put(table, NamedSharding(mesh, shared)),
        jax.device_put(rng.integers(0, vocab, (rows, seq), np.int32), NamedSharding(mesh, P(over))),
        rng.standard_normal((rows, seq, embed), np.float32),
    )


def run(mesh, parts, table, tokens, g):
    def both(table):
        out, pull = jax.vjp(
            lambda t: lookup(t, tokens, dtype=jnp.float32, mesh=mesh, parts=parts), table
        )
        return out, pull(jnp.asarray(g))[0]

    return jax.jit(both)


@pytest.mark.parametrize(
    ("vocab", "embed", "rows"), [(12, 8, 8), (13, 8, 8), (12, 7, 8), (12, 8, 3)]
)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_and_the_tables_gradient_are_those_of_plain_indexing(sizes, vocab, embed, rows):
    """Also where the mesh divides neither the table nor the rows."""
    if rows == 3:
        mesh, parts, table, _, g = problem(sizes, vocab, embed)
        tokens, g = jnp.asarray([[1, 5], [0, 5], [11, 2]], jnp.int32), g[:3, :2]
    else:
        mesh, parts, table, tokens, g = problem(sizes, vocab, embed)
    out, gradient = run(mesh, parts, table, tokens, g)(table)
    np.testing.assert_array_equal(out, np.asarray(table)[np.asarray(tokens)])
    expected = np.zeros(table.shape, np.float32)
    np.add.at(expected, np.asarray(tokens), g)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [s for s in MESHES if s.get("fsdp") == 2], ids=str)
def test_a_gradient_gathers_nothing_over_the_axes_that_split_rows_alone(sizes):
    """Of a table, and of weights that are shared as a layer's: no hidden states."""
    mesh, parts, table, tokens, g = problem(sizes)
    at = parallel.spec("layers/mlp/up/kernel", (8, 8), mesh)
    w = jax.device_put(np.eye(8, dtype=np.float32), NamedSharding(mesh, at))

    def value(table, w, g):
        hidden = lookup(table, tokens, dtype=jnp.float32, mesh=mesh, parts=parts)
        return jnp.sum(jnp.tanh(hidden @ w) * g)

    g = jax.device_put(g, tokens.sharding)
    layout = table.sharding, w.sharding
    gradient = jax.jit(jax.grad(value, (0, 1)), out_shardings=layout)
    assert gathered(gradient.lower(table, w, g), mesh) <= {"fsdp", "sequence", "tensor"}


def gathered(lowered, mesh):
    """The axes over which a program gathers."""
    program = lowered.compile().as_text()
    return {c.axis for c in collectives(program, mesh.shape) if c.kind == "all-gather"}


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"fsdp": 2, "sequence": 2}], ids=str)
def test_a_models_step_gathers_nothing_over_the_axes_that_split_rows_alone(sizes):
    """Weights are gathered over `fsdp`, keys over `sequence`, and no hidden states."""
    mesh, model = parallel.mesh(**sizes), helpers.tiny()
    module = model.module.clone(mesh=mesh, remat=None)
    layout = parallel.shardings(model.params, mesh)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        model.params,
        layout,
    )
    batch = jax.device_put(helpers.random_batch(rows=8, seq=6), parallel.rows(mesh))
    loss = losses.sft(policies.policy(dataclasses.replace(model, module=module)))
    gradient = jax.jit(
        lambda p: jax.grad(lambda p: loss(p, batch, None)[0])(p), out_shardings=layout
    )
    assert gathered(gradient.lower(params), mesh) <= {"fsdp", "sequence", "tensor"}


def test_rows_are_cast_before_they_are_sent():
    mesh, parts, table, tokens, _ = problem({"fsdp": 4})
    f = jax.jit(lambda t: lookup(t, tokens, dtype=jnp.bfloat16, mesh=mesh, parts=parts))
    assert f(table).dtype == jnp.bfloat16
    assert re.search(r"all_to_all.*bf16", f.lower(table).as_text())
