"""What a program sends is read from real compiled programs, with bytes that are known beforehand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trainjax import parallel
from trainjax.parallel.collectives import _groups, collectives, sent_by_axis

pytestmark = pytest.mark.usefixtures("optimised")

ROWS, WIDTH, LAYERS = 8, 16, 5


@pytest.fixture(scope="module")
def mesh():
    return parallel.mesh(data=1, fsdp=2, tensor=2)


def shape(mesh, dims, *spec):
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def read(mesh, f, *args, out=None, turns=1.0):
    layout = None if out is None else NamedSharding(mesh, P(*out))
    text = jax.jit(f, out_shardings=layout).lower(*args).compile().as_text()
    return collectives(text, dict(mesh.shape), turns=turns)


def test_a_sum_over_tensor_in_a_scan_counts_once_a_layer(mesh):
    """x [8 / 2 rows, 16] float32 = 256 bytes; a ring of two sends 2 * 1/2 of them, five times."""
    rows = NamedSharding(mesh, P("fsdp", "tensor"))

    def f(x, stack):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(layer, x, stack)[0]

    x = shape(mesh, (ROWS, WIDTH), "fsdp", "tensor")
    stack = shape(mesh, (LAYERS, WIDTH, WIDTH), None, "tensor", None)
    found = read(mesh, f, x, stack)
    sums = [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]
    assert {c.axis for c in found} == {"tensor"}
    assert sum(c.times for c in sums) == LAYERS
    size = ROWS // 2 * WIDTH * 4
    passes = {"all-reduce": 2, "reduce-scatter": 1}
    assert sum(c.sent for c in sums) == LAYERS * size * passes[sums[0].kind] / 2
    assert all(c.product for c in sums)


def test_a_gathered_weight_is_of_its_own_axis_and_size(mesh):
    """w [16, 16] float32 = 1024 bytes, of which each of two devices gets the half that it lacks."""
    x, w = shape(mesh, (ROWS, WIDTH), "fsdp"), shape(mesh, (WIDTH, WIDTH), "fsdp")
    whole = NamedSharding(mesh, P())
    found = read(
        mesh, lambda x, w: x @ jax.lax.with_sharding_constraint(w, whole), x, w, out=["fsdp"]
    )
    (gather,) = found
    assert (gather.kind, gather.axis, gather.size, gather.times) == ("all-gather", "fsdp", 2, 1)
    assert gather.bytes == 1024
    assert sent_by_axis(found) == {"fsdp": 512}


def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    """[16, 16] float32, summed over four and cut in four: 3/4 of 1024 bytes. A whole sum sends it twice."""
    mesh = parallel.mesh(fsdp=4)
    x = shape(mesh, (ROWS, WIDTH), "fsdp")
    (found,) = read(mesh, lambda x: x.T @ jnp.tanh(x), x, out=["fsdp"])
    assert (found.kind, found.axis, found.size) == ("reduce-scatter", "fsdp", 4)
    assert (found.bytes, found.sent) == (1024, 768)
    (whole,) = read(mesh, lambda x: x.T @ jnp.tanh(x), x, out=[])
    assert (whole.kind, whole.sent) == ("all-reduce", 1536)


def test_sums_that_the_compiler_combines_are_told_apart(mesh):
    x, y = shape(mesh, (ROWS, WIDTH), "fsdp"), shape(mesh, (ROWS, 4), "fsdp")
    found = read(mesh, lambda x, y: (x.sum(0), y.sum(0)), x, y, out=[])
    assert sorted(c.bytes for c in found) == [16, 64]


def test_a_loop_of_unknown_length_turns_as_often_as_the_caller_says(mesh):
    def f(x, w, count):
        return jax.lax.fori_loop(0, count, lambda i, x: jnp.tanh(x @ w), x)

    x, w = shape(mesh, (ROWS, WIDTH), "fsdp"), shape(mesh, (WIDTH, WIDTH), None, "tensor")
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    once, often = (sent_by_axis(read(mesh, f, x, w, count, turns=n)) for n in (1.0, 7.0))
    assert sum(often.values()) > sum(once.values()) > 0
    inside = [c for c in read(mesh, f, x, w, count, turns=7.0) if c.times == 7]
    assert inside


def test_a_program_of_one_device_sends_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert collectives(text, {"data": 1, "fsdp": 1, "tensor": 1}) == []


EVEN_AND_ODD = [[0, 2, 4, 6], [1, 3, 5, 7]]
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, x=1", EVEN_AND_ODD),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x=1", EVEN_AND_ODD),
        ("replica_groups=[4,2]<=[8], x=1", PAIRS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x=1", EVEN_AND_ODD),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x=1", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x=1", EVEN_AND_ODD),
        (
            "replica_groups=mesh['a'=8] {'a':(1)2}, x=1",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups={}, x=1", [list(range(8))]),
    ],
)
def test_groups_are_read_in_every_way_of_writing_them(text, groups):
    assert _groups(text, 8).tolist() == groups


def test_moved_pairs_leave_out_those_that_stay():
    found = _groups("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}, x=1", 4)
    np.testing.assert_array_equal(found, [[1, 2], [2, 1]])


def test_an_axis_of_several_is_told_by_all_their_names(mesh):
    """A sum over the rows of all four devices."""
    x = shape(mesh, (ROWS, WIDTH), ("fsdp", "tensor"))
    (found,) = read(mesh, lambda x: x.sum(0), x, out=[])
    assert (found.axis, found.size) == ("fsdp+tensor", 4)
    assert math.isclose(found.sent, 2 * 64 * 3 / 4)
