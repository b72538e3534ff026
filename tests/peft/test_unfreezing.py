"""Progressive unfreezing: what each stage trains, what it takes over, and what it compiles."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import losses, tree, types
from trainjax.optim.layerwise import layerwise_decay
from trainjax.peft.partial import partial, trained_layers
from trainjax.peft.unfreezing import from_peft, grow, last_first, unfreezing
from trainjax.policies import policy
from trainjax.train import init, make_step

KEY = jax.random.key(0)
PATTERNS = ["^norm", "layers/1/(attention|mlp_norm)", "layers/0/attention/query|embed"]
STEPS = 3
QUERY, NORM = "layers/attention/query/kernel", "norm/scale"


def numbered(stage, params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.flatten(stage.init(KEY, params)).items()}


def test_each_stage_trains_what_the_earlier_ones_do_and_more():
    params = helpers.tiny().params
    first, second, third = (numbered(stage, params) for stage in unfreezing(PATTERNS))
    assert first == {NORM: (32,)}
    assert (second[QUERY], second["layers/mlp_norm/scale"], second[NORM]) == (
        (1, 32, 32),
        (1, 32),
        (32,),
    )
    assert "layers/mlp/up/kernel" not in second
    assert (third[QUERY], third["layers/attention/key/kernel"]) == ((2, 32, 32), (1, 32, 16))
    assert "embed/embedding" in third


def test_from_the_output_to_the_input_the_last_stage_trains_all():
    params = helpers.tiny().params
    for layers, numbers in ((2, (1, 0)), (3, (2, 1, 0))):
        middle = (f"^layers/({i})/" for i in numbers)
        assert last_first(layers) == ["^(norm|head)/", *middle, "^embed/"]
    last = unfreezing(last_first(2))[-1]
    jax.tree.map(np.testing.assert_array_equal, last.init(KEY, params), params)


@functools.cache
def trained():
    """A run through the stages: the state at the start and the end of each, and how often it was traced."""
    model, batch, traces = helpers.tiny(), helpers.random_batch(rows=2), []
    stages = unfreezing(PATTERNS)

    def counted(inputs, params, batch, key):
        traces.append(1)
        return inputs(params, batch, key)

    tx = contract.begun_at_zero(optax.adamw(1e-2))
    step, ends = make_step(tx), []
    state = init(stages[0].init(KEY, model.params), tx)
    for before, stage in itertools.pairwise([stages[0], *stages]):
        fresh = init(stage.init(KEY, model.params), tx)
        state = grow(before, stage, model.params, state, fresh)
        begun = jax.device_get((state.step, state.params, state.opt_state))
        loss = types.Loss(counted, losses.sft(policy(model, stage)))
        for _ in range(STEPS):
            state, _ = step(state, loss, batch)
        ends.append((begun, jax.device_get((state.step, state.params, state.opt_state))))
    return ends, len(traces)


def test_a_stage_compiles_once():
    _, traces = trained()
    assert traces == len(PATTERNS)


def test_weights_moments_and_counts_of_what_trained_go_on_and_the_new_begin_at_zero():
    params = helpers.tiny().params
    ends, _ = trained()
    joined = ["|".join(f"(?:{p})" for p in PATTERNS[: i + 1]) for i in range(len(PATTERNS))]
    layers = [trained_layers(pattern, params) for pattern in joined]
    for stage, ((_, end), (begun, _)) in enumerate(itertools.pairwise(ends)):
        (step, old, state), (same_step, new, grown) = end, begun
        assert step == same_step == STEPS * (stage + 1)
        for name in ("count", "mu", "nu"):
            assert len(optax.tree_utils.tree_get_all_with_path(grown, name)) == 1
        assert optax.tree_utils.tree_get(grown, "count") == step
        for kind in ("mu", "nu", None):
            here, there = (
                tree.flatten(optax.tree_utils.tree_get(s, kind) if kind else weights)
                for s, weights in ((state, old), (grown, new))
            )
            for name, leaf in there.items():
                base = np.asarray(tree.flatten(params)[name]) * (kind is None)
                ids = layers[stage + 1][name]
                expected = np.array(base if ids is None else base[list(ids)])
                if name in here and ids is None:
                    expected = here[name]
                elif name in here:
                    expected[[ids.index(i) for i in layers[stage][name]]] = here[name]
                np.testing.assert_array_equal(leaf, expected, f"{kind} {name}")


def test_an_adapter_alone_grows_too():
    params = helpers.tiny().params
    before, after = unfreezing(["layers/1/attention", "layers/0/attention"])
    old = jax.tree.map(lambda leaf: leaf + 1, before.init(KEY, params))
    found = grow(before, after, params, old, after.init(KEY, params))
    added = np.asarray([0, 1], np.float32)[:, None, None]
    np.testing.assert_array_equal(
        found["layers"]["attention"]["query"]["kernel"],
        params["layers"]["attention"]["query"]["kernel"] + added,
    )


def test_the_first_update_of_a_new_weight_is_as_large_as_the_docstring_says():
    """Adam far from its start: 0.1 / sqrt(0.001) learning rates."""
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(2)}}
    before, after = unfreezing(["a", "b"])
    tx = optax.adam(1.0)
    state = tx.init(before.init(KEY, params))
    state = optax.tree_utils.tree_set(state, count=jnp.asarray(100_000, jnp.int32))
    new = after.init(KEY, params)
    grown = grow(before, after, params, state, tx.init(new))
    with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, new), grown, new)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.1 / np.sqrt(0.001), rtol=1e-3)


def test_learning_rates_by_depth_go_with_stages_of_some_layers():
    params, pattern = helpers.tiny().params, "layers/1/attention/query"
    tx = layerwise_decay(0.5, 2, layers=trained_layers(pattern, params))
    adapter = partial(pattern).init(KEY, params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
    np.testing.assert_allclose(tree.flatten(updates)[QUERY], 0.5)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "unfreezing needs a pattern for each stage"),
        (["norm", "norm"], "has one twice"),
        (["norm", "("], r"'\(' is not a regular expression"),
    ],
    ids=str,
)
def test_bad_patterns_are_named(patterns, message):
    with pytest.raises(ValueError, match=message):
        unfreezing(patterns)


def test_a_group_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="group=0: a stage unfreezes at least 1 layer"):
        last_first(3, 0)


def test_a_stage_that_trains_less_is_refused():
    params = helpers.tiny().params
    adapter = partial("query").init(KEY, params)
    for after in (partial("layers/0/attention/query"), partial("norm")):
        with pytest.raises(
            ValueError, match=f"{QUERY} trains in the stage before, and in the next"
        ):
            grow(partial("query"), after, params, adapter, after.init(KEY, params))


def test_the_state_of_another_optimizer_is_refused():
    params = helpers.tiny().params
    stage = partial("norm/")
    adapter = stage.init(KEY, params)
    old, new = (tx.init(adapter) for tx in (optax.adam(1.0), optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"the old state has .*count and the new one does not"):
        grow(stage, stage, params, old, new)


def test_files_are_those_of_partial():
    assert from_peft(types.PeftFiles({"peft_type": "TRAINJAX"}, {}), {}, {}) is None
