"""Several adapters in one batch: each row gets its own, in training, scoring and generation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import helpers, toy
from tests.peft import contract
from trainjax import losses, models, parallel, tree
from trainjax.peft import lora
from trainjax.peft.switched import chosen, member, stacked, switched
from trainjax.train import make_step

KEY = jax.random.key(0)
IDS = np.int32([2, -1, 0, 2])
BATCH = helpers.random_batch(rows=4, seq=8)


@jax.jit
def logprobs(policy, params, batch):
    return policy(params, batch).logprobs


def several(count: int = 3, **settings):
    method = switched(count, rank=2, alpha=4.0, **settings)
    return method, contract.moved(method.init(KEY, helpers.tiny().params))


def alone(model, method, adapter, batch):
    """Each row by itself with its own adapter, or as the base has it."""
    rows = []
    for row, number in enumerate(IDS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        own = None if number < 0 else member(jax.device_get(adapter), int(number))
        rows.append(logprobs(tj.policy(model, method), own, one))
    return np.concatenate(rows)


def test_each_row_of_a_batch_goes_through_its_own_adapter_and_minus_one_is_the_base():
    model, (method, adapter) = helpers.tiny(), several()
    found = logprobs(tj.policy(model, method), adapter, BATCH | {"adapters": IDS})
    expected = alone(model, lora(rank=2, alpha=4.0), adapter, BATCH)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_rows_of_four_devices_go_through_their_own_adapters():
    model, (method, adapter) = helpers.tiny(), several()
    mesh = helpers.mesh_of(1, 2, 2)
    spread = contract.changed(model, mesh=mesh)
    spread = spread.with_params(parallel.place(model.params, mesh))
    theirs = contract.moved(method.init(KEY, spread.params))
    batch = jax.device_put(BATCH | {"adapters": IDS}, parallel.rows(mesh))
    found = logprobs(tj.policy(spread, method), theirs, batch)
    expected = logprobs(tj.policy(model, method), adapter, BATCH | {"adapters": IDS})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


SGD = optax.chain(contract.recorded, optax.sgd(0.05))
STEP = make_step(SGD)


def after_steps(method, adapter, batch, steps: int = 1):
    """The adapter after so many steps, and gradients and loss of the last."""
    state = contract.begun(adapter, contract.begun_at_zero(SGD))
    for _ in range(steps):
        state, metrics = STEP(state, losses.sft(tj.policy(helpers.tiny(), method)), batch)
    return state.params, contract.gradients_in(state), float(metrics["loss"])


def weights_of(number: int) -> np.ndarray:
    """The batch's weights in the rows of one adapter, and zeros in others."""
    return np.where(IDS[:, None] == number, BATCH["weights"], 0).astype(np.float32)


def test_gradients_reach_an_adapter_only_from_its_own_rows():
    """They are those of a plain LoRA that sees these rows and no others."""
    method, adapter = several()
    _, found, _ = after_steps(method, adapter, BATCH | {"adapters": IDS})
    plain = lora(rank=2, alpha=4.0)
    for number in range(3):
        own = member(jax.device_get(adapter), number)
        _, expected, _ = after_steps(plain, own, BATCH | {"weights": weights_of(number)})
        helpers.assert_close(
            {name: leaf[:, number] for name, leaf in found.items()}, expected, 1e-5
        )
    assert not any(leaf[:, 1].any() for leaf in found.values())


def test_other_numbers_compile_nothing_and_micro_batches_change_nothing():
    model, (method, adapter) = helpers.tiny(), several()
    loss, batch = losses.sft(tj.policy(model, method)), BATCH | {"adapters": IDS}
    _, grads, value = after_steps(method, adapter, batch)
    with contract.compilations() as compiled:
        for ids in (IDS[::-1].copy(), np.int32([0, 0, 0, 1])):
            after_steps(method, adapter, BATCH | {"adapters": ids})
    assert not compiled
    same, again = helpers.loss_and_gradients(loss, adapter, batch, accumulate=2)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    helpers.assert_close(again, grads, 1e-6)


def test_adapters_of_other_ranks_scales_and_targets_are_stacked_and_each_stays_itself():
    model = helpers.tiny()
    methods = [
        lora(rank=3, alpha=1.0, target="query|up"),
        lora(rank=2, alpha=7.0, rslora=True),
        lora(rank=1, target="down", alpha_pattern={"layers/1": 5.0}),
    ]
    members = [(m, contract.moved(m.init(KEY, model.params), i)) for i, m in enumerate(methods)]
    method, adapter = stacked(members, model.params)
    ids = np.int32([0, 1, 2, -1])
    found = logprobs(tj.policy(model, method), adapter, BATCH | {"adapters": ids})
    for row, (own, theirs) in enumerate([*members, (None, None)]):
        policy = tj.policy(model, own) if own else tj.policy(model, lora())
        one = {name: value[row : row + 1] for name, value in BATCH.items()}
        expected = logprobs(policy, theirs, one)
        np.testing.assert_allclose(found[row : row + 1], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def toy_model():
    """Weights four times as large as usual, so that answers depend on the whole prompt."""
    made = models.random_model(toy.CONFIG, KEY, tokenizer=toy.tokenizer())
    return made.with_params(jax.tree.map(lambda w: 4 * w if w.ndim > 2 else w, made.params))


def test_each_prompt_is_answered_through_its_own_adapter(toy_model):
    """Prompts of unequal length, which change places, in batches that do not come out even."""
    prompts = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96], [100] * 60, [80]]
    ids = [2, 0, -1, 1, 2]
    plain, method = lora(rank=2, alpha=4.0), switched(3, rank=2, alpha=4.0)
    adapter = contract.moved(method.init(KEY, toy_model.params), std=0.3)
    served = toy_model.with_params(method.attach(toy_model.params, adapter))
    found = tj.generate(served, prompts, adapters=ids, max_new_tokens=8, batch_size=2)
    for prompt, number, answer in zip(prompts, ids, found, strict=True):
        params = toy_model.params
        if number >= 0:
            params = plain.attach(params, member(adapter, number))
        (expected,) = tj.generate(
            toy_model.with_params(params), [prompt], max_new_tokens=8, batch_size=2
        )
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=2e-5)
    assert found[1].tokens != found[4].tokens


def test_a_batch_with_adapters_leaves_the_reference_the_base():
    model, method = helpers.tiny(), switched(3, rank=2)
    batch = BATCH | {"adapters": IDS}
    found = jax.jit(lambda reference, batch: reference(batch).logprobs)(tj.reference(model), batch)
    np.testing.assert_array_equal(found, logprobs(tj.policy(model, method), None, BATCH))


def test_what_is_missing_or_not_there_is_named(toy_model):
    model, (method, adapter) = helpers.tiny(), several()
    with pytest.raises(ValueError, match="3 adapters here, and nobody said which rows take which"):
        logprobs(tj.policy(model, method), adapter, BATCH)
    plain = lora(rank=2)
    first = plain.init(KEY, model.params)
    with pytest.raises(ValueError, match="weights have none to choose from; attach"):
        logprobs(tj.policy(model, plain), first, BATCH | {"adapters": IDS})
    attached = method.attach(model.params, adapter)
    for number in (3, -2):
        with pytest.raises(ValueError, match=f"adapter {number} is not there: they are 0 to 2"):
            chosen(attached, [0, number])
    with pytest.raises(ValueError, match="1 adapters for 2 prompts"):
        tj.generate(toy_model, [[3], [4]], adapters=[0])
    with pytest.raises(ValueError, match="count=0: at least one"):
        switched(0)
    with pytest.raises(ValueError, match="head/kernel is outside the layers"):
        switched(2, rank=2, target="kernel").init(KEY, model.params)
    with pytest.raises(ValueError, match="no adapters to stack"):
        stacked([], model.params)
    with pytest.raises(ValueError, match="adapter 0 is no plain LoRA"):
        stacked([(method, adapter)], model.params)


def test_dropout_is_each_rows_own_and_only_with_a_key():
    model, (method, adapter) = helpers.tiny(), several(dropout=0.5)
    run = jax.jit(lambda policy, params, batch, key: policy(params, batch, key).logprobs)
    batch = BATCH | {"adapters": IDS}
    first, other = (run(tj.policy(model, method), adapter, batch, key) for key in (KEY, None))
    base = IDS < 0
    np.testing.assert_array_equal(first[base], other[base])
    assert bool(jnp.all(jnp.any(first[~base] != other[~base], axis=1)))


def test_training_several_at_once_is_training_each_alone():
    """Plain SGD, five steps: a row's adapter moves as if it were the only one."""
    (method, adapter), plain = several(), lora(rank=2, alpha=4.0)
    own = member(jax.device_get(adapter), 2)
    params, *_ = after_steps(method, adapter, BATCH | {"adapters": IDS}, 5)
    lonely, *_ = after_steps(plain, own, BATCH | {"weights": weights_of(2)}, 5)
    found = tree.flatten(member(jax.device_get(params), 2))
    helpers.assert_close(found, tree.flatten(lonely), 1e-5)


def with_rows(method):
    """The method with four rows' adapters said beforehand, for tests whose batches do not say."""

    def attach(own, params, adapter, key=None):
        return chosen(own(params, adapter, key), [0, 1, 1, 0])

    return method._replace(attach=functools.partial(attach, method.attach))


class TestContract(contract.Contract):
    merges = False
    methods = {"two": with_rows(switched(2, rank=2, alpha=4.0))}

    def test_files_bring_the_same_function_back(self, model, method, tmp_path):
        adapter = contract.moved(method.init(KEY, model.params))
        tj.save_adapter(tmp_path, model, method, adapter)
        other, again = tj.load_adapter(tmp_path, model)
        found = with_rows(other).attach(model.params, again)
        expected = method.attach(model.params, adapter)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
