"""AdaLoRA: the budget's schedule, which values it keeps, the penalty, files and training beside PEFT's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract, library
from tests.peft.fake_quant import dequantised, quantised
from trainjax import losses, tree
from trainjax.peft._rank_budget import RankBudget
from trainjax.peft.adalora import adalora
from trainjax.policies import policy
from trainjax.train import Checkpoints, make_step
from trainjax.types import PeftFiles

KEY = jax.random.key(0)
UP = "layers/mlp/up/kernel"
SMALL = {"rank": 2, "initial_rank": 4, "alpha": 6.0}


def test_the_update_is_a_e_b_over_the_initial_rank():
    method = adalora(**SMALL, target="up")
    params = helpers.tiny().params
    adapter = contract.moved(method.init(KEY, params))
    a, b, e = (np.asarray(tree.flatten(adapter)[f"{UP}/{part}"], np.float64) for part in "abe")
    w = np.asarray(tree.flatten(params)[UP], np.float64)
    expected = w + 6 / (4 + 1e-5) * (a * e[:, None, :]) @ b
    found = tree.flatten(method.merge(params, adapter))[UP]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_penalty_is_the_mean_distance_from_orthonormal_vectors():
    method = adalora(**SMALL, target="up|query", orthogonality=0.3)
    adapter = contract.moved(method.init(KEY, helpers.tiny().params), std=0.5)
    distances = []
    for name, x in tree.flatten(adapter).items():
        for layer in np.asarray(x, np.float64) if not name.endswith("/e") else ():
            product = layer.T @ layer if name.endswith("/a") else layer @ layer.T
            distances.append(np.linalg.norm(product - np.eye(4)))
    value, metrics = jax.jit(lambda adapter: method.penalty(adapter, {}, None))(adapter)
    np.testing.assert_allclose(value, 0.3 * np.mean(distances), rtol=1e-6)
    np.testing.assert_allclose(metrics["orthogonality"], np.mean(distances), rtol=1e-6)


def test_the_penaltys_gradient_is_finite_where_the_vectors_are_orthonormal():
    parts = {"a": np.eye(6, 4), "b": np.eye(4, 5), "e": np.ones(4)}
    adapter = {"kernel": {name: np.float32(part) for name, part in parts.items()}}
    penalty = lambda adapter: adalora(**SMALL).penalty(adapter, {}, None)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(penalty))(adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_budget_falls_by_a_cubic_and_the_last_choice_is_of_the_rank():
    """2 matrices from 4 to 2 values each, 12 steps, of which 2 come before and 2 after.

    Left at step t is the integer part of (8 - 4) (1 - (t - 2) / 8)^3 + 4: 6.68, 5.69, 4.98, 4.5, 4.21,
    4.06, 4.01, 4 from step 3 to 10; with `every=3` at steps 3, 6, 9 and the last, 10.
    """
    expected = [-1, -1, -1, 2, 3, 4, 4, 4, 4, 4, 4, -1, -1]
    found = RankBudget(2, 4, 2, 2, 1, 0.85, 0.85).dropped(2, 12)
    np.testing.assert_array_equal(found, expected)
    sparse = RankBudget(2, 4, 2, 2, 3, 0.85, 0.85).dropped(2, 12)
    np.testing.assert_array_equal(np.flatnonzero(sparse >= 0), [3, 6, 9, 10])


STEPS = 9
SHRINKING = adalora(**SMALL, target="up|query", warmup=2, final=3)
"""Four matrices, 16 values before step 2 and 8 from step 6 on."""
CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
TX = SHRINKING.transform(STEPS, contract.begun_at_zero(CHAIN))
STEP = make_step(TX)


def shrinking_loss():
    actor = policy(helpers.tiny(), SHRINKING)
    return losses.sft(actor) + losses.adapter_penalty(actor)


def at_the_start():
    """The state before the first step."""
    return contract.begun(SHRINKING.init(KEY, helpers.tiny().params), TX)


@functools.cache
def trained():
    """Params and optimizer state after each of the run's steps."""
    state, states = at_the_start(), []
    for _ in range(STEPS):
        state, _ = STEP(state, shrinking_loss(), contract.batch())
        states.append(jax.device_get((state.params, state.opt_state)))
    return states


def values_of(state) -> np.ndarray:
    """All singular values."""
    named = tree.flatten(state[0]).items()
    return np.concatenate([np.asarray(x).ravel() for name, x in named if name.endswith("/e")])


def test_values_outside_the_budget_are_exactly_zero_and_stay_so():
    states = trained()
    left = [int((values_of(state) != 0).sum()) for state in states]
    assert left[:2] == [16, 16]
    assert left[5:] == [8, 8, 8, 8]
    assert left == sorted(left, reverse=True)
    gone = values_of(states[5]) == 0
    for state in states[6:]:
        np.testing.assert_array_equal(values_of(state) == 0, gone)


def test_the_allocation_survives_a_checkpoint(tmp_path):
    """Killed in the middle of the fall: the rest of the run is bit by bit the same."""
    state, loss = at_the_start(), shrinking_loss()
    for _ in range(4):
        state, _ = STEP(state, loss, contract.batch())
    left = (values_of((state.params,)) != 0).sum()
    assert 8 < left < 16
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state, {})
    saved.wait()
    state = saved.restore(at_the_start()).state
    saved.close()
    for _ in range(4, STEPS):
        state, _ = STEP(state, loss, contract.batch())
    contract.equal((state.params, state.opt_state), trained()[-1])


def test_what_is_not_an_adapter_goes_through_the_optimizer_alone():
    """A scorer's head beside the adapter, of which there is no importance."""
    method = adalora(**SMALL, target="up")
    body = contract.moved(method.init(KEY, helpers.tiny().params))
    params = {"body": body, "score": {"kernel": jnp.ones((3, 1))}}
    tx = method.transform(4, optax.sgd(1.0))
    updates, state = jax.jit(lambda params: tx.update(params, tx.init(params), params))(params)
    np.testing.assert_array_equal(updates["score"]["kernel"], -1.0)
    assert set(state.importance) == {f"body/{UP}/{part}" for part in "abe"}


def test_a_file_holds_the_values_that_are_left_and_which_they_were(tmp_path):
    model, adapter = helpers.tiny(), jax.tree.map(jnp.array, trained()[-1][0])
    tj.save_adapter(tmp_path, model, SHRINKING, adapter)
    found, _ = tj.io.peft.read(tmp_path)
    pattern = found.fields["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 8
    for name, kept in pattern.items():
        assert found.tensors[name].shape == (sum(kept), 1)
    _, again = tj.load_adapter(tmp_path, model)
    for name, x in tree.flatten(adapter).items():
        if name.endswith("/e"):
            np.testing.assert_array_equal(tree.flatten(again)[name], x)


def test_over_a_quantised_base_it_is_the_update_over_the_dequantised_one():
    model, method = helpers.tiny(), adalora(**SMALL)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 and initial_rank=0: the rank at the end is from 1"),
        ({"rank": 13, "initial_rank": 12}, "rank=13 and initial_rank=12"),
        ({"initial_rank": 17}, "initial_rank=17 is above the sides of layers/attention/key/kernel"),
        ({"warmup": -1}, "warmup=-1 and final=0: steps are at least 0"),
        ({"every": 0}, "every=0: values are chosen"),
        ({"beta1": 1.0}, "beta1=1.0 smooths over steps"),
        ({"beta2": 0.0}, "beta2=0.0 smooths over steps"),
        ({"orthogonality": -0.5}, "orthogonality=-0.5: the penalty's weight"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"target": "qeury"}, "matches 'qeury'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        adalora(**settings).init(KEY, helpers.tiny().params)


def test_a_run_too_short_for_its_budget_is_refused():
    with pytest.raises(ValueError, match="warmup=3 and final=3 leave none of 6 steps"):
        adalora(warmup=3, final=3).transform(6, optax.sgd(1.0))


def exported(fields, tensors) -> PeftFiles:
    """Of an adapter on both `up`s; a tensor that is None is left out."""
    method = adalora(**SMALL, target="mlp/up")
    modules = {f"layers/{n}/mlp/up/kernel": f"model.layers.{n}.mlp.up_proj" for n in (0, 1)}
    found = method.export(method.init(KEY, helpers.tiny().params), modules)
    changed = {k: v for k, v in (found.tensors | tensors).items() if v is not None}
    return PeftFiles(found.fields | fields, changed)


FIRST = "model.layers.0.mlp.up_proj.lora"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"use_rslora": True}, {}, "sets use_rslora=True, which is not supported"),
        (
            {},
            {f"{FIRST}_E": None},
            "not all of lora_A, lora_B and lora_E for model.layers.0.mlp.up",
        ),
        (
            {},
            {f"{FIRST}_A": np.ones((4, 7), np.float32)},
            r"lora_A \(4, 7\), .* with 4 singular values",
        ),
        ({}, {f"{FIRST}_E": np.full((4, 1), np.nan, np.float32)}, "up_proj: lora_E holds NaN"),
        (
            {"rank_pattern": {f"{FIRST}_E": [True]}},
            {},
            "rank_pattern has 1 entries for .* init_r=4",
        ),
        (
            {},
            {"model.norm.lora_A": np.ones((4, 7), np.float32)},
            "has not all of lora_A, lora_B and lora_E for model.norm",
        ),
    ],
    ids=["field", "missing", "shape", "nan", "pattern", "unknown"],
)
def test_files_that_cannot_be_are_refused_by_name(tmp_path, fields, tensors, message):
    model = helpers.tiny()
    tj.io.peft.write(tmp_path, exported(fields, tensors), model.fingerprint)
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(tmp_path, model)


class TestContract(contract.Contract):
    methods = {"plain": adalora(rank=2, initial_rank=3, alpha=6.0)}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
class TestParity:
    def config(self, **changes):
        import peft

        settings = {"target_r": 2, "init_r": 4, "lora_alpha": 6, "target_modules": library.ALL}
        settings |= {"total_step": library.STEPS, "tinit": 4, "tfinal": 5, "deltaT": 2}
        return peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings | changes)

    @pytest.mark.parametrize(
        "settings", [{}, {"layers_to_transform": [1]}], ids=["all", "one layer"]
    )
    def test_it_is_the_same_function_in_peft_both_ways(self, tmp_path, settings):
        library.assert_same_both_ways(tmp_path, self.config(**settings))

    def test_it_trains_without_a_budget_as_in_peft(self, tmp_path):
        library.assert_same_trace(tmp_path, self.config(target_r=4), 1e-2)

    @pytest.mark.parametrize("every", [1, 3])
    def test_the_same_values_are_kept_at_every_step(self, tmp_path, every):
        model = library.base(tmp_path / "base")
        theirs = library.wrapped(tmp_path / "base", self.config(deltaT=every))
        theirs.save_pretrained(tmp_path / "theirs")
        method, adapter = tj.load_adapter(tmp_path / "theirs", model)
        zeros = []

        def allocate(step):
            theirs.base_model.update_and_allocate(step)
            values = [p for name, p in theirs.named_parameters() if "lora_E" in name]
            zeros.append(sum(int((p == 0).sum()) for p in values))

        expected = library.trace(theirs, library.adamw(theirs, 1e-2), allocate)
        found, state = library.our_trace(
            model, method, adapter, optax.adamw(1e-2, weight_decay=0.0)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert zeros[-1] == 28  # of 14 matrices 4 values each, of which 2 stay on average
        theirs.save_pretrained(tmp_path / "trained")
        tj.save_adapter(tmp_path / "ours", model, method, state.params)
        patterns = [
            tj.io.peft.read(tmp_path / name)[0].fields["rank_pattern"]
            for name in ("trained", "ours")
        ]
        assert patterns[0] == patterns[1]
        again = library.loaded(tmp_path / "base", tmp_path / "ours")
        library.assert_same(library.logits(again), library.our_logits(model, method, state.params))
