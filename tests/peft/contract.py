"""What every parameter-efficient method promises, as tests: a method's own file inherits them.

class TestContract(contract.Contract):
    methods = {"plain": lora(rank=2)}

A program of the decoder takes longer to compile than all else here, so a method has few of them, and
its tests ask each several questions: the step on one device, two members under `vmap`, four devices,
bfloat16, and logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

import trainjax as tj
from tests import helpers
from trainjax import losses, parallel, platform, sharing, tree, types
from trainjax.models import Model
from trainjax.nn import remat
from trainjax.policies import policy
from trainjax.train import Checkpoints, init, make_step
from trainjax.train.state import TrainState
from trainjax.types import Batch, Loss, Params, Peft

KEY = jax.random.key(0)
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6)


def begun_at_zero(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose state of zeros is made without a program for each of the shapes."""

    def begin(params: Params) -> Any:
        shapes = jax.eval_shape(tx.init, params)
        return jax.tree.map(lambda leaf: jnp.array(np.zeros(leaf.shape, leaf.dtype)), shapes)

    return optax.GradientTransformation(begin, tx.update)


recorded = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (grads, grads),
)
"""An optimizer whose state is the last gradient, which it hands on as it is."""

TX = begun_at_zero(optax.chain(recorded, optax.adamw(1e-2, weight_decay=0.1)))
STEP = make_step(TX)  # one for all tests: a method's is compiled once


def batch() -> dict[str, np.ndarray]:
    """Four rows, two of them packed from two examples."""
    examples = [np.arange(3, 3 + n, dtype=np.int32) * 7 % 61 for n in (12, 5, 6, 9, 4, 11)]
    return helpers.packed(examples, [[0], [1, 2], [3, 4], [5]], 14)


def moved(adapter: Params, seed: int = 1, std: float = 0.1) -> Params:
    """The adapter with noise on all that trains: as training leaves it, nothing is at zero any more."""

    def leaf(name: str, old: jax.Array) -> jax.Array:
        noise = std * np.random.default_rng([seed, *name.encode()]).standard_normal(old.shape)
        return jax.device_put(np.asarray(old) + noise.astype(old.dtype), old.sharding)

    return tree.with_trained(adapter, tree.map_named(leaf, tree.trainable(adapter)))


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def begun(adapter: Params, tx: optax.GradientTransformation = TX) -> TrainState:
    """The state before the first step: of arrays of the host, whose copies are no programs."""
    return init(jax.device_get(adapter), tx)


def gradients_in(state: TrainState) -> dict[str, np.ndarray]:
    """What the step before left."""
    return jax.device_get(tree.flatten(state.opt_state[0]))


def on_all_of(mesh: Mesh, adapter: Params) -> Params:
    """What has no layout over the mesh is whole on each of its devices, as in a state of training."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Array) -> Array:
        return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, whole)

    return jax.tree.map(place, adapter)


def changed(model: Model, **settings: Any) -> Model:
    """The model whose module has other settings, such as `remat`; the params are the same arrays."""
    return dataclasses.replace(model, module=model.module.clone(**settings))


def _value_and_gradients(
    restore: sharing.Restore, arrays: list[Array], adapter: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Array, Params]:
    def of_trained(trained: Params) -> tuple[Array, types.Metrics]:
        return restore(arrays)(tree.with_trained(adapter, trained), batch, key)

    (value, _), grads = jax.value_and_grad(of_trained, has_aux=True)(tree.trainable(adapter))
    return value, grads


@functools.partial(platform.jit, static_argnums=0)
def _of_members(restore: sharing.Restore, arrays: list[Array], *rest: Any) -> tuple[Array, Params]:
    one = functools.partial(_value_and_gradients, restore, arrays)
    return jax.vmap(one, (0, None, None))(*rest)


_of_one = functools.partial(platform.jit, static_argnums=0)(_value_and_gradients)


def values_and_gradients(loss: Loss, adapter: Params, batch: Batch, members: bool = False) -> Any:
    """As of the first step, with its random numbers; of a stack of adapters those of each."""
    arrays, restore = sharing.distinct(loss)  # as in a step: terms share the policy's forward pass
    program = _of_members if members else _of_one
    values, grads = program(restore, arrays, adapter, batch, jax.random.fold_in(KEY, 0))
    return jax.device_get((values, tree.flatten(grads)))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Fills with the names of the programs that JAX meets for the first time."""
    found: list[str] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            found.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def with_biases(params: Params) -> Params:
    """The params of a model whose queries, keys and values have a bias each, as a Qwen2's have."""
    named, rng = tree.flatten(params), np.random.default_rng(0)
    for name in ("query", "key", "value"):
        layers, _, outputs = named[f"layers/attention/{name}/kernel"].shape
        bias = rng.standard_normal((layers, outputs))
        named[f"layers/attention/{name}/bias"] = jnp.array(bias, jnp.float32)
    return tree.unflatten(dict(sorted(named.items())))


def configured(model: Model, params: Params | None = None, **settings: Any) -> Model:
    """The model as another configuration has it, such as a window, of the same or other weights."""
    config = dataclasses.replace(model.config, **settings)
    other = dataclasses.replace(changed(model, config=config), config=config)
    return other if params is None else other.with_params(params)


def narrow(params: Params) -> Params:
    """The params in bfloat16, rounded on the host as JAX rounds."""
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf).astype(jnp.bfloat16)), params)


def logits(model: Model, params: Params) -> dict[str, np.ndarray]:
    """Of the model with other weights, by a name for `assert_close`."""
    return {"logits": np.asarray(model.with_params(params).logits(TOKENS))}


class Run(NamedTuple):
    """Twenty steps on one device, in float32, with the layers computed again.

    Attributes:
        losses: of each step.
        gradients: of the first.
        first: the adapter before it, frozen arrays as plain ones.
        last: the same after the last.
        trains: the names of what trains.
        base_before: the base's params before the first step.
        compiled: the programs that the second and later steps added, each with a loss made anew.
    """

    losses: list[float]
    gradients: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]
    trains: set[str]
    base_before: Params
    compiled: list[str]


class Contract:
    """Attributes that a subclass sets.

    Attributes:
        methods: by name, small enough for `helpers.tiny()`; after the first they are in the slow part.
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
            first, *others = (
                pytest.param(method, id=name) for name, method in self.methods.items()
            )
            again = [
                pytest.param(*other.values, id=other.id, marks=pytest.mark.slow) for other in others
            ]
            metafunc.parametrize("method", [first, *again])

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
    @functools.cache
    def first(cls, method: Peft) -> Params:
        """The adapter as it begins."""
        return method.init(KEY, helpers.tiny(**cls.settings).params)

    @classmethod
    @functools.cache
    def run(cls, method: Peft) -> Run:
        """The training that several tests look at."""
        model = helpers.tiny(**cls.settings)
        base = jax.tree.map(np.array, model.params)
        adapter = moved(cls.first(method))
        first = jax.device_get(tree.flatten(tree.thawed(adapter)))
        state, metrics = STEP(begun(adapter), cls.loss(model, method), batch())
        gradients, values = gradients_in(state), [float(metrics["loss"])]
        with compilations() as compiled:
            for _ in range(19):
                state, metrics = STEP(state, cls.loss(model, method), batch())
                values.append(float(metrics["loss"]))
        last = jax.device_get(tree.flatten(tree.thawed(state.params)))
        trains = set(tree.flatten(tree.trainable(state.params)))
        return Run(values, gradients, first, last, trains, base, compiled)

    def test_it_begins_as_the_base_exactly(self, model, method):
        if not self.begins_as_base:
            pytest.skip("this method adds something by its definition")
        found = logits(model, method.attach(model.params, self.first(method)))
        helpers.assert_close(found, logits(model, model.params), 1e-5)

    def test_what_trains_is_float32(self, model, method):
        params = narrow(model.params)
        trained = tree.trainable(jax.eval_shape(method.init, KEY, params))
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
        assert tree.count(trained) > 0

    def test_every_part_gets_a_gradient_and_only_what_trains_moves(self, model, method):
        """Twenty steps with weight decay; the base and what is frozen stay bit by bit."""
        run = self.run(method)
        assert np.isfinite(run.losses).all()
        assert run.losses[-1] < run.losses[0]
        equal(model.params, run.base_before)
        for name, value in run.last.items():
            assert np.array_equal(value, run.first[name]) != (name in run.trains), name

    def test_a_second_step_compiles_nothing_and_equal_settings_are_one_method(self, method):
        assert not self.run(method).compiled

    def test_merged_and_attached_are_one_function(self, model, method):
        adapter = moved(self.first(method))
        if not self.merges:
            with pytest.raises(ValueError, match="merge"):
                method.merge(model.params, adapter)
            return
        merged = method.merge(model.params, adapter)
        assert not any(tree.is_weight(leaf) for leaf in tree.flatten(merged).values())
        found = logits(model, merged)
        helpers.assert_close(found, logits(model, method.attach(model.params, adapter)), 1e-5)
        base = logits(model, model.params)
        assert float(np.abs(found["logits"] - base["logits"]).max()) > 1e-2

    def test_merging_keeps_the_dtypes(self, model, method):
        if not self.merges:
            pytest.skip("this method does not merge")
        params = narrow(model.params)
        merged = jax.eval_shape(
            lambda params: method.merge(params, method.init(KEY, params)), params
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}

    def test_members_under_vmap_that_keep_the_projections_are_each_alone(self, model, method):
        """Gradients of two adapters at once, with other things computed again than in the run."""
        members = [moved(self.first(method), seed) for seed in (1, 2)]
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(members))
        loss = self.loss(changed(model, remat=remat.projections), method)
        values, grads = values_and_gradients(loss, stack, batch(), members=True)
        run = self.run(method)
        state, metrics = STEP(begun(members[1]), self.loss(model, method), batch())
        alone = [run.losses[0], float(metrics["loss"])], [run.gradients, gradients_in(state)]
        np.testing.assert_allclose(values, alone[0], rtol=1e-6)
        for member, expected in enumerate(alone[1]):
            found = {name: leaf[member] for name, leaf in grads.items()}
            helpers.assert_close(found, expected, 1e-5)

    @pytest.mark.slow
    def test_gradients_are_the_same_where_nothing_is_computed_again(self, model, method):
        loss = self.loss(changed(model, remat=None), method)
        value, grads = values_and_gradients(loss, moved(self.first(method)), batch())
        np.testing.assert_allclose(value, self.run(method).losses[0], rtol=1e-6)
        helpers.assert_close(grads, self.run(method).gradients, 1e-5)

    def test_four_devices_that_compute_nothing_again_give_what_one_gives(self, model, method):
        run, mesh = self.run(method), helpers.mesh_of(1, 2, 2)
        spread = changed(model, mesh=mesh, remat=None).with_params(
            parallel.place(model.params, mesh)
        )
        theirs = method.init(KEY, spread.params)
        near = functools.partial(
            np.testing.assert_allclose, rtol=self.start_tolerance, atol=self.start_tolerance
        )
        jax.tree.map(near, theirs, self.first(method))
        found, same = values_and_gradients(
            self.loss(spread, method),
            on_all_of(mesh, moved(theirs)),
            jax.device_put(batch(), parallel.rows(mesh)),
        )
        np.testing.assert_allclose(found, run.losses[0], rtol=1e-5)
        helpers.assert_close(same, run.gradients, 1e-4)

    def test_a_checkpoint_brings_state_and_trace_back(self, model, method, tmp_path):
        loss = self.loss(model, method)
        state, _ = STEP(begun(moved(self.first(method))), loss, batch())
        with_saved = Checkpoints(tmp_path / "checkpoints")
        with_saved.save(state, {})
        with_saved.wait()
        restored = with_saved.restore(begun(self.first(method)))
        with_saved.close()
        assert restored is not None
        _, found = STEP(restored.state, loss, batch())
        assert float(found["loss"]) == self.run(method).losses[1]

    def test_files_bring_the_same_function_back(self, model, method, tmp_path):
        adapter = moved(self.first(method))
        tj.save_adapter(tmp_path, model, method, adapter)
        other, again = tj.load_adapter(tmp_path, model)
        expected = logits(model, method.attach(model.params, adapter))
        helpers.assert_close(logits(model, other.attach(model.params, again)), expected, 1e-6)

    def test_bfloat16_is_near_float32(self, model, method):
        adapter = moved(self.first(method), std=0.03)
        state, metrics = STEP(begun(adapter), self.loss(model, method), batch())
        value, grads = float(metrics["loss"]), gradients_in(state)
        low = changed(model, dtype=jnp.dtype("bfloat16")).with_params(narrow(model.params))
        found, same = values_and_gradients(self.loss(low, method), adapter, batch())
        np.testing.assert_allclose(found, value, rtol=0.05)
        flat, near = (
            np.concatenate([g[n].ravel() for n in sorted(g)]).astype(np.float64)
            for g in (grads, same)
        )
        cosine = flat @ near / (np.linalg.norm(flat) * np.linalg.norm(near))
        assert cosine > 0.97
