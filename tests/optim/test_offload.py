import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import bigram, helpers
from trainjax import losses, optim, train
from trainjax.train import Checkpoints


def batch():
    return helpers.packed([np.arange(3, 15, dtype=np.int32)] * 4, [[0], [1], [2], [3]], 12)


def run(tx, params, steps=4):
    state, step, values = train.init(params, tx), train.make_step(tx), []
    for _ in range(steps):
        state, metrics = step(state, losses.sft(bigram.Narrow()), batch())
        values.append(float(metrics["loss"]))
    return state, values


def kinds(tree):
    return {(leaf.sharding.memory_kind, leaf.size >= 64) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("spread", [False, True], ids=["one device", "four devices"])
def test_moments_wait_on_the_host_and_training_is_the_same(spread):
    mesh = helpers.mesh_of(1, 2, 2) if spread else None
    params = bigram.narrow_params(mesh)
    tx = optim.offloaded(optax.adamw(1e-2), at_least=64)
    state, found = run(tx, params)
    assert kinds(state.opt_state) == {("pinned_host", True), ("device", False)}
    assert kinds(state.params) == {("device", True), ("device", False)}
    _, expected = run(optax.adamw(1e-2), params)
    assert found == expected
    if spread:
        kernel = state.opt_state[0].mu["head"]["kernel"]
        assert kernel.sharding.spec == P("fsdp", "tensor")


def test_a_checkpoint_brings_it_back_to_the_host(tmp_path):
    params = bigram.narrow_params()
    tx = optim.offloaded(optax.adamw(1e-2), at_least=64)
    state, _ = run(tx, params, 2)
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state, {})
    saved.wait()
    again = saved.restore(train.init(params, tx)).state
    saved.close()
    assert kinds(again.opt_state) == {("pinned_host", True), ("device", False)}
    jax.tree.map(np.testing.assert_array_equal, again.opt_state, state.opt_state)


def test_a_sharded_array_keeps_its_layout():
    mesh = helpers.mesh_of(1, 4, 1)
    w = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, P("fsdp")))
    tx = optim.offloaded(optax.sgd(0.1, momentum=0.9), at_least=1)
    state = train.init({"w": w}, tx)
    assert state.opt_state[0].trace["w"].sharding.spec == P("fsdp")
