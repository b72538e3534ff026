"""Methods against forgetting: what they add to a stage, what they remember, what they refuse."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from trainjax import continual, estimate, losses, tree
from trainjax.continual import Learned, Method
from trainjax.continual.low_rank import joined
from trainjax.losses import Anchored
from trainjax.optim.hft import training_half
from trainjax.peft import lora
from trainjax.policies import Reference

LORA = lora(rank=2, target="query|up")
LORA_OF_ANOTHER = lora(rank=2, target="query|gate")
TASKS = 3
METHODS = [
    *(continual.sequential, continual.joint, continual.replay, continual.hft, continual.lwf),
    *(continual.ewc, continual.online_ewc, continual.l2_sp, continual.si, continual.mas),
    *(continual.o_lora, continual.reg_lora),
]
WITH_STRENGTH = [m for m in METHODS if "strength" in inspect.signature(m).parameters]
BATCH = helpers.random_batch(rows=4)


@functools.cache
def setting():
    """A policy, and its adapter as each of two tasks might leave it."""
    model = helpers.tiny()
    policy = tj.policy(model, LORA)
    return policy, *(helpers.trained(LORA, model.params, 0.1, seed) for seed in (1, 2))


def task(number: int, params, method: Method, memory) -> Learned:
    """A stage of one step from the params, as the method sees it."""
    policy, *_ = setting()
    ours = method.policy(policy, memory)
    tx = method.optimizer(optax.sgd(1e-2), memory, 5)
    state = tx.init(params)
    grads = gradient(losses.sft(ours), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return Learned(number, params, state, ours, lambda count: iter([rows(count)]))


@jax.jit
def slope(loss, params, batch):
    return jax.grad(lambda params: loss(params, batch)[0])(params)


def gradient(loss, params):
    return slope(loss, params, BATCH)


def rows(count: int):
    """The first rows of the batch."""
    return jax.tree.map(lambda leaf: leaf[:count], BATCH)


@functools.cache
def after_two(make, **coefficients):
    """The memory before and after each of the two tasks."""
    method = make(**coefficients)
    _, first, second = setting()
    memory = [method.init(first, TASKS)]
    for number, params in enumerate((first, second)):
        memory.append(method.learned(memory[-1], task(number, params, method, memory[-1])))
    return memory


def shapes(memory):
    return jax.tree.structure(memory), [leaf.shape for leaf in jax.tree.leaves(memory)]


@jax.jit
def run(loss, params, batch):
    return loss(params, batch)[0]


def value(loss, params) -> float:
    return float(run(loss, params, BATCH))


def assert_close(found, wanted, tolerance: float = 1e-5) -> None:
    helpers.assert_close(tree.flatten(found), tree.flatten(wanted), tolerance)


# --- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_a_memory_keeps_its_shapes_so_that_any_stage_restores_into_the_first(method):
    before, *others = after_two(method)
    for memory in others:
        assert shapes(memory) == shapes(before)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_the_first_task_is_learned_without_a_penalty_and_later_ones_with_one(method):
    policy, _, moved = setting()
    memory = after_two(method)
    for number in (0, 1):
        penalty = method().penalty(memory[number], policy, number)
        size = 0.0 if penalty is None else value(penalty, moved)
        expected = number > 0 and method in WITH_STRENGTH and method is not continual.replay
        assert (size > 0) == expected


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("method", WITH_STRENGTH, ids=lambda m: m.__name__)
def test_a_strength_that_is_not_above_0_is_refused(method, strength):
    with pytest.raises(ValueError, match=f"strength={strength} protects nothing; give a number"):
        method(strength=strength)


def test_other_coefficients_are_checked_before_anything_is_learned():
    for make, sentence in (
        (lambda: continual.ewc(samples=0), "samples=0: an estimate is from at least one"),
        (lambda: continual.online_ewc(decay=2.0), "decay=2.0 of the old tasks' Fisher"),
        (lambda: continual.si(damping=0.0), "damping=0.0 divides by 0"),
        (lambda: continual.replay(capacity=0), "capacity=0: a reservoir keeps"),
        (lambda: continual.reg_lora(fraction=0.0), "fraction=0.0 of a matrix's entries"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


# --- quadratic ----------------------------------------------------------------------------------


def test_ewc_pulls_like_the_sum_of_one_penalty_a_task():
    policy, first, second = setting()
    method = continual.ewc(strength=3.0)
    memory = after_two(continual.ewc)
    start = helpers.trained(LORA, policy.base, 0.1, seed=3)
    ends = [
        task(n, p, method, m).params
        for n, (p, m) in enumerate(zip((first, second), memory[:2], strict=True))
    ]
    each = [estimate.fisher(losses.sft(policy), end, [BATCH]) for end in ends]
    wanted = losses.ewc(ends[0], each[0], 3.0).named("a") + losses.ewc(ends[1], each[1], 3.0)
    found = gradient(method.penalty(memory[2], policy, 2), start)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found))
    unit = functools.partial(jax.tree.map, lambda leaf: leaf / scale)
    assert_close(unit(found), unit(gradient(wanted, start)))


def test_online_ewc_has_the_newest_anchor_and_earlier_fishers_decay():
    method = continual.online_ewc(decay=0.5)
    _, one, two = after_two(continual.online_ewc, decay=0.5)
    new = task(1, setting()[2], method, one)
    fisher = estimate.fisher(losses.sft(setting()[0]), new.params, [BATCH])
    assert_close(two.anchor, new.params)
    assert_close(two.fisher, jax.tree.map(lambda old, now: 0.5 * old + now, one.fisher, fisher))


def test_mas_adds_the_importances_of_its_tasks():
    method = continual.mas()
    _, one, two = after_two(continual.mas)
    end = task(1, setting()[2], method, one)
    omega = estimate.mas(setting()[0], end.params, [BATCH])
    scale = max(float(leaf.max()) for leaf in jax.tree.leaves(two.fisher))
    unit = functools.partial(jax.tree.map, lambda leaf: leaf / scale)
    assert_close(unit(two.fisher), unit(jax.tree.map(jnp.add, one.fisher, omega)))


def test_si_goes_on_from_the_importances_before_and_measures_from_where_the_task_began():
    policy, _, second = setting()
    _, one, two = after_two(continual.si, damping=0.01)
    grads = gradient(losses.sft(policy), second)
    moved = jax.tree.map(lambda g: -1e-2 * g, grads)

    def importance(old, g, step):
        return old + jnp.maximum(-g * step, 0.0) / (step**2 + 0.01)

    wanted = jax.tree.map(importance, one.fisher, grads, moved)
    scale = max(float(leaf.max()) for leaf in jax.tree.leaves(wanted))
    unit = functools.partial(jax.tree.map, lambda leaf: leaf / scale)
    assert_close(unit(two.fisher), unit(wanted), 1e-4)


def test_a_fisher_of_another_tree_is_refused_by_name():
    policy, params, _ = setting()
    other = LORA_OF_ANOTHER.init(jax.random.key(0), policy.base)
    method = continual.ewc()
    mixed = Anchored(params, method.init(other, TASKS).fisher)
    with pytest.raises(
        ValueError, match="the Fisher and the anchor are of different trees: 'layer"
    ):
        method.penalty(mixed, policy, 1)
    elsewhere = method.penalty(method.init(other, TASKS), policy, 1)
    with pytest.raises(ValueError, match="the params and the anchor are of different trees"):
        elsewhere(params, BATCH)


# --- distillation -------------------------------------------------------------------------------


def test_lwf_is_nothing_at_the_old_params_and_grows_away_from_them():
    policy, _, second = setting()
    *_, memory = after_two(continual.lwf)
    penalty = continual.lwf(strength=2.0).penalty(memory, policy, 2)
    assert abs(value(penalty, memory)) < 1e-6
    far = jax.tree.map(lambda leaf: 2.0 * leaf, second)
    wanted = losses.lwf(policy, Reference(policy, memory))
    assert value(penalty, far) == pytest.approx(2.0 * value(wanted, far), rel=1e-5)


# --- one adapter a task -------------------------------------------------------------------------


def test_the_joined_adapter_is_the_sum_of_the_updates():
    policy, first, second = setting()
    method = continual.o_lora()
    memory = method.init(first, TASKS)
    for number, params in enumerate((first, second)):
        state = task(number, params, method, memory)
        memory = method.learned(memory, state._replace(params=params))
    once = LORA.merge(policy.base, joined(memory))
    twice = LORA.merge(LORA.merge(policy.base, first), second)
    assert_close(once, twice)


def test_a_task_trains_on_the_base_with_the_adapters_before_it():
    policy, first, second = setting()
    method = continual.reg_lora()
    memory = method.init(first, TASKS)
    memory = method.learned(memory, Learned(0, first, (), policy, lambda count: iter([])))
    merged = LORA.merge(policy.base, first)
    on_merged = tj.policy(helpers.tiny().with_params(merged), LORA)
    logprobs = jax.jit(lambda policy, batch: policy(second, batch).logprobs)
    found = logprobs(method.policy(policy, memory), BATCH)
    np.testing.assert_allclose(found, logprobs(on_merged, BATCH), atol=2e-5)


def test_stages_begin_with_an_adapter_of_their_own():
    _, first, second = setting()
    for method in (continual.o_lora(), continual.reg_lora()):
        assert method.start(first, lambda: second) is second
    assert continual.ewc().start(first, lambda: second) is first


def test_reg_lora_protects_the_key_entries_of_every_earlier_task():
    policy, first, second = setting()
    method = continual.reg_lora(strength=1.0, fraction=0.05)
    memory = method.init(first, TASKS)
    entries = []
    for number, params in enumerate((first, second)):
        memory = method.learned(memory, Learned(number, params, (), policy, lambda n: iter([])))
        entries.append(losses.key_entries(params, 0.05))
    both = {k: jnp.concatenate([e[k] for e in entries], axis=-1) for k in entries[0]}
    params = helpers.trained(LORA, policy.base, 0.1, seed=3)
    wanted = value(losses.reg_lora(both, 1.0), params)
    assert value(method.penalty(memory, policy, 2), params) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("method", [continual.o_lora, continual.reg_lora], ids=lambda m: m.__name__)
def test_whole_matrices_are_refused_where_adapters_are_needed(method):
    with pytest.raises(ValueError, match="is of low-rank adapters, and 'embed.* trains as a whole"):
        method().init(helpers.tiny().params, TASKS)


# --- half fine-tuning ---------------------------------------------------------------------------


def trains(params, seed: int) -> dict[str, np.ndarray]:
    """Which entries of the params a step of half fine-tuning changes."""
    tx = continual.hft().optimizer(optax.sgd(1.0), (), seed)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    return {name: np.asarray(leaf != 0) for name, leaf in tree.flatten(updates).items()}


def test_hft_freezes_both_factors_of_half_of_the_adapted_matrices():
    _, params, _ = setting()
    found = trains(params, seed=0)
    halves = []
    for name in {name.rpartition("/")[0] for name in found}:
        a, b = (found[f"{name}/{factor}"].all(axis=(-2, -1)) for factor in "ab")
        assert (a == found[f"{name}/a"].any(axis=(-2, -1))).all()  # the whole of it or nothing
        np.testing.assert_array_equal(a, b)
        halves.append(a.mean())
    assert np.mean(halves) == 0.5
    others = [trains(params, seed) for seed in range(1, 6)]
    assert any((found[name] != other[name]).any() for other in others for name in found)


def test_the_state_of_hft_has_no_buffer_twice_since_a_step_donates_it():
    _, params, _ = setting()
    tx = continual.hft().optimizer(optax.sgd(1.0), (), 0)
    leaves = jax.tree.leaves(tx.init(params))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_hft_of_all_weights_is_half_fine_tuning():
    params = helpers.tiny().params
    wanted = tree.flatten(training_half(params, 3, r"^layers/.*kernel$"))
    for name, leaf in trains(params, seed=3).items():
        np.testing.assert_array_equal(leaf, np.broadcast_to(wanted[name], leaf.shape))
