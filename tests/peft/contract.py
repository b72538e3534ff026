"""What every parameter-efficient method promises, as tests: a method's own file inherits them.

class TestContract(contract.Contract):
    methods = {"plain": lora(rank=2)}
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from trainjax import losses, parallel, tree, types
from trainjax.nn import remat
from trainjax.policies import policy
from trainjax.train import Checkpoints, init, make_step
from trainjax.types import Params, Peft

KEY = jax.random.key(0)
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6)
TX = optax.adamw(1e-2, weight_decay=0.1)
STEP = make_step(TX)  # one for all tests: a method's is compiled once


def batch() -> dict[str, np.ndarray]:
    """Four rows, two of them packed from two examples."""
    examples = [np.arange(3, 3 + n, dtype=np.int32) * 7 % 61 for n in (12, 5, 6, 9, 4, 11)]
    return helpers.packed(examples, [[0], [1, 2], [3, 4], [5]], 14)


def moved(adapter: Params, seed: int = 1, std: float = 0.1) -> Params:
    """The adapter with noise on all that trains: as training leaves it, nothing is at zero any more."""

    def leaf(name: str, old: jax.Array) -> jax.Array:
        noise = std * np.random.default_rng([seed, *name.encode()]).standard_normal(old.shape)
        return jax.device_put(old + noise.astype(old.dtype), old.sharding)

    return tree.with_trained(adapter, tree.map_named(leaf, tree.trainable(adapter)))


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Contract:
    """Attributes that a subclass sets.

    Attributes:
        methods: by name, small enough for `helpers.tiny()`.
        begins_as_base: whether attaching the first adapter changes nothing.
        merges: whether there are weights that do the same.
        settings: of the tiny model.
        start_tolerance: of the first adapter on four devices; 0 where the start is drawn and not
            computed from weights, whose sums four devices add in another order.
    """

    methods: ClassVar[dict[str, Peft]] = {}
    begins_as_base: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    settings: ClassVar[dict[str, Any]] = {}
    start_tolerance: ClassVar[float] = 0.0

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "method" in metafunc.fixturenames:
            metafunc.parametrize("method", [*self.methods.values()], ids=[*self.methods])

    @pytest.fixture
    def model(self):
        return helpers.tiny(**self.settings)

    @staticmethod
    def loss(model: Any, method: Peft) -> types.Loss:
        """The loss that a recipe trains with: the method's own term is part of it."""
        actor = policy(model, method)
        task = losses.sft(actor)
        return task if method.penalty is None else task + losses.adapter_penalty(actor)

    @classmethod
    @functools.cache  # several tests compare with it
    def expected(cls, method: Peft) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and gradients on one device, in float32, with the layers computed again."""
        model = helpers.tiny(**cls.settings)
        adapter = moved(method.init(KEY, model.params))
        return helpers.loss_and_gradients(cls.loss(model, method), adapter, batch())

    def test_it_begins_as_the_base_exactly(self, model, method):
        if not self.begins_as_base:
            pytest.skip("this method adds something by its definition")
        adapter = method.init(KEY, model.params)
        expected = model.logits(TOKENS)
        found = model.with_params(method.attach(model.params, adapter)).logits(TOKENS)
        helpers.assert_close({"logits": found}, {"logits": expected}, 1e-5)

    def test_what_trains_is_float32(self, model, method):
        params = tree.cast(model.params, jnp.bfloat16)
        trained = tree.trainable(method.init(KEY, params))
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
        assert tree.count(trained) > 0

    def test_every_part_gets_a_gradient_and_only_what_trains_moves(self, model, method):
        """Twenty steps with weight decay; the base and what is frozen stay bit by bit."""
        first = moved(method.init(KEY, model.params))
        before = jax.tree.map(np.asarray, (model.params, tree.thawed(first)))
        state, loss, values = init(first, TX), self.loss(model, method), []
        for _ in range(20):
            state, metrics = STEP(state, loss, batch())
            values.append(float(metrics["loss"]))
        assert np.isfinite(values).all()
        assert values[-1] < values[0]
        equal(model.params, before[0])
        trains = tree.flatten(tree.trainable(state.params))
        for name, value in tree.flatten(tree.thawed(state.params)).items():
            old = tree.flatten(before[1])[name]
            assert np.array_equal(value, old) != (name in trains), name

    def test_merged_and_attached_are_one_function(self, model, method):
        adapter = moved(method.init(KEY, model.params))
        if not self.merges:
            with pytest.raises(ValueError, match="merge"):
                method.merge(model.params, adapter)
            return
        merged = method.merge(model.params, adapter)
        assert not any(tree.is_weight(leaf) for leaf in tree.flatten(merged).values())
        attached = model.with_params(method.attach(model.params, adapter)).logits(TOKENS)
        found = model.with_params(merged).logits(TOKENS)
        helpers.assert_close({"logits": found}, {"logits": attached}, 1e-5)
        assert float(jnp.abs(found - model.logits(TOKENS)).max()) > 1e-2

    def test_merging_keeps_the_dtypes(self, model, method):
        if not self.merges:
            pytest.skip("this method does not merge")
        params = tree.cast(model.params, jnp.bfloat16)
        merged = method.merge(params, method.init(KEY, params))
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}

    @pytest.mark.parametrize("kept", [None, remat.projections], ids=["all", "projections"])
    def test_gradients_are_the_same_whatever_is_computed_again(self, model, method, kept):
        adapter = moved(method.init(KEY, model.params))
        value, grads = self.expected(method)
        other = helpers.tiny(remat=kept, **self.settings)
        again, same = helpers.loss_and_gradients(self.loss(other, method), adapter, batch())
        np.testing.assert_allclose(again, value, rtol=1e-6)
        helpers.assert_close(same, grads, 1e-5)

    def test_members_under_vmap_are_each_alone(self, model, method):
        members = [moved(method.init(KEY, model.params), seed) for seed in (1, 2)]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        loss = self.loss(model, method)
        one = lambda member, rows: loss(member, rows)[0]  # noqa: E731
        together = jax.jit(jax.vmap(one, (0, None)))(stack, batch())
        alone = jnp.stack(list(map(jax.jit(one), members, [batch(), batch()])))
        np.testing.assert_allclose(together, alone, rtol=1e-5)

    def test_four_devices_give_what_one_gives(self, model, method):
        value, grads = self.expected(method)
        mesh = helpers.mesh_of(1, 2, 2)
        spread = helpers.tiny(mesh=mesh, **self.settings)
        spread = spread.with_params(parallel.place(model.params, mesh))
        theirs = method.init(KEY, spread.params)
        near = functools.partial(
            np.testing.assert_allclose, rtol=self.start_tolerance, atol=self.start_tolerance
        )
        jax.tree.map(near, theirs, method.init(KEY, model.params))
        found, same = helpers.loss_and_gradients(
            self.loss(spread, method), moved(theirs), jax.device_put(batch(), parallel.rows(mesh))
        )
        np.testing.assert_allclose(found, value, rtol=1e-5)
        helpers.assert_close(same, grads, 1e-4)

    def test_a_second_step_compiles_nothing_and_equal_settings_are_one_method(self, model, method):
        traces = []

        def counted(inputs, params, batch, key):
            traces.append(1)
            return inputs(params, batch, key)

        tx = optax.adamw(1e-3)
        state, step = init(method.init(KEY, model.params), tx), make_step(tx)
        for _ in range(3):
            loss = types.Loss(counted, self.loss(model, method))
            state, _ = step(state, loss, batch())
        assert len(traces) == 1

    def test_a_checkpoint_brings_state_and_trace_back(self, model, method, tmp_path):
        loss = self.loss(model, method)
        state, _ = STEP(init(moved(method.init(KEY, model.params)), TX), loss, batch())
        with_saved = Checkpoints(tmp_path / "checkpoints")
        with_saved.save(state, {})
        with_saved.wait()
        _, expected = STEP(state, loss, batch())
        restored = with_saved.restore(init(method.init(KEY, model.params), TX))
        with_saved.close()
        assert restored is not None
        _, found = STEP(restored.state, loss, batch())
        assert float(found["loss"]) == float(expected["loss"])

    def test_files_bring_the_same_function_back(self, model, method, tmp_path):
        adapter = moved(method.init(KEY, model.params))
        tj.save_adapter(tmp_path, model, method, adapter)
        other, again = tj.load_adapter(tmp_path, model)
        expected = model.with_params(method.attach(model.params, adapter)).logits(TOKENS)
        found = model.with_params(other.attach(model.params, again)).logits(TOKENS)
        helpers.assert_close({"logits": found}, {"logits": expected}, 1e-6)

    def test_bfloat16_is_near_float32(self, model, method):
        adapter = moved(method.init(KEY, model.params), std=0.03)
        narrow = helpers.tiny(compute_dtype=jnp.bfloat16, **self.settings)
        narrow = narrow.with_params(tree.cast(model.params, jnp.bfloat16))
        value, grads = helpers.loss_and_gradients(self.loss(model, method), adapter, batch())
        found, same = helpers.loss_and_gradients(self.loss(narrow, method), adapter, batch())
        np.testing.assert_allclose(found, value, rtol=0.05)
        flat, near = (
            np.concatenate([g[n].ravel() for n in sorted(g)]).astype(np.float64)
            for g in (grads, same)
        )
        cosine = flat @ near / (np.linalg.norm(flat) * np.linalg.norm(near))
        assert cosine > 0.97
