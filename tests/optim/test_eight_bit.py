import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import bigram, helpers
from trainjax import losses, optim, train, tree
from trainjax.optim import eight_bit


def dynamic_map(*, signed):
    """The numbers from their definition: decades of equal parts, 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade * (1 if signed else 2) + 1)
        middles = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *(-middles if signed else ())]
    return np.sort(found)


@pytest.mark.parametrize("signed", [True, False])
def test_the_256_numbers_are_those_of_the_dynamic_map(signed):
    expected = dynamic_map(signed=signed)
    assert len(expected) == 256
    np.testing.assert_allclose(np.sort(eight_bit.table(signed=signed)), expected, rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_gets_the_nearest_code(signed):
    """Everywhere, and around every midpoint between two codes."""
    known = dynamic_map(signed=signed)
    middles = (known[1:] + known[:-1]) / 2
    rng = np.random.default_rng(0)
    x = np.concatenate([middles * 0.999, middles * 1.001, rng.uniform(-1, 1, 9000), known])
    x = np.concatenate([x, 10.0 ** rng.uniform(-8, 0, 9000), [0.0, 1.0, -1.0]])
    x = x if signed else np.abs(x)
    codes = jax.jit(lambda x: eight_bit.nearest(x, signed=signed))(x.astype(np.float32))
    found = np.asarray(eight_bit.numbers(codes, signed=signed), np.float64)
    best = np.abs(x[:, None] - known).min(1)
    np.testing.assert_allclose(np.abs(found - x), best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_its_own_nearest(signed):
    codes = np.arange(256, dtype=np.uint8)
    again = jax.jit(
        lambda x: eight_bit.nearest(eight_bit.numbers(x, signed=signed), signed=signed)
    )(codes)
    np.testing.assert_array_equal(again, codes)


def test_each_block_has_a_scale_of_its_own():
    """The last of the rows is of zeros alone."""
    x = np.random.default_rng(0).standard_normal((3, 5, 64))
    x *= np.append(np.logspace(-8, 4, 14), 0).reshape(3, 5, 1)

    @jax.jit
    def there_and_back(x):
        packed = eight_bit.EightBit.of(x, signed=True, block=32)
        return packed, packed.value()

    packed, value = jax.device_get(there_and_back(x.astype(np.float32)))
    assert packed.codes.shape == x.shape
    assert packed.codes.dtype == np.uint8
    assert packed.scales.shape == (3, 5, 2)
    error = np.abs(value - x).reshape(-1, 32).max(-1)
    largest = np.abs(x).reshape(-1, 32).max(-1)
    assert (
        error[:-2] < 0.008 * largest[:-2]
    ).all()  # half a part of the first decade, 0.9 / 64 / 2
    assert not value[-1, -1].any()


def test_the_state_takes_a_quarter_and_small_arrays_stay():
    params = {
        "layers": {"w": np.zeros((4, 64, 512), np.float32)},
        "norm": np.zeros(64, np.float32),
        "odd": np.zeros((64, 257), np.float32),
    }
    state = jax.eval_shape(optim.adamw_8bit(1e-3).init, params)
    plain = jax.eval_shape(optax.adamw(1e-3).init, params)
    moments = state[0]
    assert isinstance(moments.mu["layers"]["w"], optim.EightBit)
    assert moments.mu["layers"]["w"].signed
    assert not moments.nu["layers"]["w"].signed
    assert isinstance(moments.mu["norm"], jax.ShapeDtypeStruct)
    assert isinstance(moments.nu["odd"], jax.ShapeDtypeStruct)  # 257 is a prime
    large = 2 * 4 * 64 * 512
    saved = tree.num_bytes(plain) - tree.num_bytes(state)
    assert saved == large * 3 - large // 256 * 4


@pytest.mark.parametrize(
    ("make", "plain", "rate"),
    [(optim.adamw_8bit, optax.adamw, 3e-2), (optim.lion_8bit, optax.lion, 3e-3)],
)
def test_the_loss_stays_within_two_percent_of_float32(make, plain, rate):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 60, 16).astype(np.int32) for _ in range(8)]
    batch = helpers.packed(rows, [[n] for n in range(8)], 16)
    loss, params, curves = losses.sft(bigram.Narrow()), bigram.narrow_params(), []
    packed = 0
    for tx in (optim.in_eight_bits(plain(rate), at_least=64), plain(rate)):
        state, values, step = train.init(params, tx), [], train.make_step(tx)
        for _ in range(60):
            state, metrics = step(state, loss, batch)
            values.append(float(metrics["loss"]))
        curves.append(values)
        packed += sum(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(state.opt_state))
    assert packed >= 2
    assert curves[1][-1] < 0.7 * curves[1][0]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.02)
    assert isinstance(jax.eval_shape(make(rate).init, params), tuple)


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: np.asarray(rng.standard_normal(shape), np.float32)  # noqa: E731
    return tree.unflatten({name: draw(shape) for name, shape in shapes.items()})


SHAPES = {
    "layers/w": (4, 8, 64),
    "layers/norm": (4, 8),
    "table": (96, 64),
    "odd": (67, 64),
    "b": (),
}


@pytest.mark.parametrize("plain", [optax.adamw, optax.lion])
def test_one_array_at_a_time_is_the_same_update(plain, monkeypatch):
    """In pieces, with a decay that goes by name, and a count that rises by one a step."""
    monkeypatch.setattr(eight_bit, "_PIECE", 512)
    mask = lambda params: tree.map_named(lambda name, _: name.endswith("w"), params)  # noqa: E731
    found = {}
    for elementwise in (False, True):
        tx = plain(optax.linear_schedule(1e-2, 1e-3, 3), weight_decay=0.1, mask=mask)
        tx = optim.in_eight_bits(tx, at_least=16, elementwise=elementwise)

        @jax.jit
        def updated(grads, state, params, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = filled(SHAPES)
        state = jax.jit(tx.init)(params)
        for n in range(3):
            params, state = updated(filled(SHAPES, n + 1), state, params)
        found[elementwise] = params, state
    assert jax.tree.structure(found[True]) == jax.tree.structure(found[False])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, *jax.device_get((found[True], found[False])))


SPECS = {"one": ("fsdp",), "other": (None, "fsdp"), "both": ("fsdp", "tensor")}


@pytest.mark.parametrize("name", ["layers/w", "table"])
def test_the_update_moves_nothing_among_devices(name, monkeypatch):
    """Of three arrays in one program, each in parts along another axis or along two."""
    monkeypatch.setattr(eight_bit, "_PIECE", 512)
    mesh = helpers.mesh_of(1, 2, 2)
    leading = (None,) if name == "layers/w" else ()
    axes = {spec: P(*leading, *axes) for spec, axes in SPECS.items()}
    tx = optim.in_eight_bits(optax.adamw(1e-3), at_least=16, block=16, elementwise=True)

    def placed(path, leaf):
        """A moment, or a matrix, laid out as the matrix of its name."""
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = axes[names[-1]] if leaf.ndim else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = dict.fromkeys(axes, jax.ShapeDtypeStruct(SHAPES[name], np.float32))
    state = jax.eval_shape(tx.init, params)
    params, state = (jax.tree_util.tree_map_with_path(placed, x) for x in (params, state))
    program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert program.count(" while(") >= len(axes)  # each does go in pieces
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in program
