import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import helpers
from trainjax import losses, optim, train, tree
from trainjax.optim import eight_bit
from trainjax.policies import policy


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
    codes = jax.jit(lambda x: eight_bit.nearest(x, signed=signed))(jnp.asarray(x, jnp.float32))
    found = np.asarray(eight_bit.numbers(codes, signed=signed), np.float64)
    best = np.abs(x[:, None] - known).min(1)
    np.testing.assert_allclose(np.abs(found - x), best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_its_own_nearest(signed):
    codes = jnp.arange(256, dtype=jnp.uint8)
    again = eight_bit.nearest(eight_bit.numbers(codes, signed=signed), signed=signed)
    np.testing.assert_array_equal(again, codes)


def test_each_block_has_a_scale_of_its_own():
    x = np.random.default_rng(0).standard_normal((3, 4, 64)) * np.logspace(-8, 4, 12).reshape(
        3, 4, 1
    )
    packed = eight_bit.EightBit.of(jnp.asarray(x, jnp.float32), signed=True, block=32)
    assert packed.codes.shape == x.shape
    assert packed.codes.dtype == jnp.uint8
    assert packed.scales.shape == (3, 4, 2)
    error = np.abs(np.asarray(packed.value()) - x).reshape(3, 4, 2, 32).max(-1)
    largest = np.abs(x).reshape(3, 4, 2, 32).max(-1)
    assert (error < 0.008 * largest).all()  # half a part of the first decade, 0.9 / 64 / 2
    assert not np.asarray(
        eight_bit.EightBit.of(jnp.zeros((2, 32)), signed=True, block=32).value()
    ).any()


def test_the_state_takes_a_quarter_and_small_arrays_stay():
    params = {
        "layers": {"w": jnp.zeros((4, 64, 512))},
        "norm": jnp.zeros(64),
        "odd": jnp.zeros((64, 257)),
    }
    state = optim.adamw_8bit(1e-3).init(params)
    plain = optax.adamw(1e-3).init(params)
    moments = state[0]
    assert isinstance(moments.mu["layers"]["w"], optim.EightBit)
    assert moments.mu["layers"]["w"].signed
    assert not moments.nu["layers"]["w"].signed
    assert isinstance(moments.mu["norm"], jax.Array)
    assert isinstance(moments.nu["odd"], jax.Array)  # 257 is a prime
    large = 2 * 4 * 64 * 512
    saved = tree.num_bytes(plain) - tree.num_bytes(state)
    assert saved == large * 3 - large // 256 * 4


@pytest.mark.parametrize(
    ("make", "plain", "rate"),
    [(optim.adamw_8bit, optax.adamw, 3e-3), (optim.lion_8bit, optax.lion, 3e-4)],
)
def test_the_loss_stays_within_two_percent_of_float32(make, plain, rate):
    model = helpers.tiny(hidden_size=32, intermediate_size=64)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 60, 16).astype(np.int32) for _ in range(8)]
    batch = helpers.packed(rows, [[n] for n in range(8)], 16)
    loss, curves = losses.sft(policy(model)), []
    for tx in (optim.in_eight_bits(plain(rate), at_least=64), plain(rate)):
        state, values = train.init(model.params, tx), []
        step = train.make_step(tx)
        for _ in range(60):
            state, metrics = step(state, loss, batch)
            values.append(float(metrics["loss"]))
        curves.append(values)
    assert curves[1][-1] < 0.7 * curves[1][0]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.02)
    assert isinstance(make(rate).init(model.params), tuple)


def filled(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    named = zip(shapes.items(), keys, strict=True)
    return tree.unflatten({name: jax.random.normal(key, shape) for (name, shape), key in named})


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
        params, update = filled(SHAPES), jax.jit(tx.update)
        state = tx.init(params)
        for n in range(3):
            updates, state = update(filled(SHAPES, n + 1), state, params)
            params = optax.apply_updates(params, updates)
        found[elementwise] = params, state
    assert jax.tree.structure(found[True]) == jax.tree.structure(found[False])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, found[True], found[False])


@pytest.mark.parametrize("name", ["layers/w", "table"])
@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), ("fsdp", "tensor")])
def test_the_update_moves_nothing_among_devices(name, spec, monkeypatch):
    monkeypatch.setattr(eight_bit, "_PIECE", 512)
    mesh = helpers.mesh_of(1, 2, 2)
    axes = P(None, *spec) if name == "layers/w" else P(*spec)
    params = {"w": jax.device_put(filled({name: SHAPES[name]}), NamedSharding(mesh, axes))}
    tx = optim.in_eight_bits(optax.adamw(1e-3), at_least=16, block=16, elementwise=True)
    state = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, axes if x.ndim else P())), tx.init(params)
    )
    program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert "while" in program  # it does go in pieces
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in program
