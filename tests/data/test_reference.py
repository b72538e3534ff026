"""Log-probabilities of a reference that are computed once: theirs, token by token, and not of other data."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers, toy
from trainjax import policies

ROWS = [
    {"prompt": f"say {i}", "chosen": "ab" * (1 + i % 5), "rejected": f"no {i}"} for i in range(7)
]


def examples(rows=ROWS, share: bool = True) -> tj.data.Examples:
    return tj.data.encode_groups(rows, toy.tokenizer(), 64, share_prompt=share)


def by_hand(batch) -> np.ndarray:
    """A number that depends on the token and its place, in place of a model."""
    tokens, positions = (batch[name].astype(np.float32) for name in ("tokens", "positions"))
    return tokens + positions / 100


@pytest.mark.parametrize("mesh", [None, (2, 2, 1)])
@pytest.mark.parametrize("share", [True, False])
def test_every_token_gets_its_own(mesh, share):
    mesh = mesh and helpers.mesh_of(*mesh)
    plain = examples(share=share)
    cached = tj.data.with_reference(plain, jax.jit(by_hand), batch_size=4, mesh=mesh)
    plan = tj.data.Plan(2, 192, tj.data.best_fit)
    for planned in plan.epoch(cached, 3):
        batch = tj.data.fill(cached, plan, planned)
        real = batch["segments"] > 0
        np.testing.assert_allclose(
            batch["reference_logprobs"][real], by_hand(batch)[real], rtol=1e-6
        )
        assert not batch["reference_logprobs"][~real].any()


def test_a_loss_reads_them_in_place_of_the_reference():
    model = tj.models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())
    model = model.with_params(helpers.randomised(model.params, 0.12))
    method = tj.peft.lora(rank=2)
    adapter = helpers.trained(method, model.params)
    ours, reference = tj.policy(model, method), tj.reference(model)
    cached = tj.data.with_reference(examples(), policies.reference_logprobs(reference))
    plan = tj.data.Plan(8, 192, tj.data.unpacked)
    batch = jax.device_put(tj.data.fill(cached, plan, plan.epoch(cached, 0)[0]))
    batch["labels"] = jnp.ones_like(batch["groups"])
    both = jax.jit(lambda loss, *args: loss(*args))
    (expected, wanted), (found, metrics) = (
        both(
            sum(make(ours, theirs).named(make.__name__) for make in (tj.losses.dpo, tj.losses.kto)),
            adapter,
            batch,
        )
        for theirs in (reference, policies.CachedReference())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert metrics.keys() == wanted.keys()
    for name in ("dpo/rewards/margins", "kto/rewards/margins"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    del batch["reference_logprobs"]
    with pytest.raises(ValueError, match=r"no reference_logprobs, only .*tokens.*with_reference"):
        tj.losses.dpo(ours, policies.CachedReference())(adapter, batch)


@pytest.fixture
def saved(tmp_path):
    cached = tj.data.with_reference(examples(), jax.jit(by_hand))
    tj.data.save_reference(tmp_path / "a.safetensors", cached, "w1")
    return cached, tmp_path / "a.safetensors"


def test_what_is_saved_is_read(saved):
    cached, path = saved
    loaded = tj.data.load_reference(path, examples(), "w1")
    np.testing.assert_array_equal(loaded.reference, cached.reference)
    assert list(path.parent.iterdir()) == [path]


def test_what_is_of_something_else_or_damaged_is_refused(saved):
    _, path = saved
    with pytest.raises(
        ValueError, match=r"a\.safetensors holds .* of other weights \(fin.* w1, now w2"
    ):
        tj.data.load_reference(path, examples(), "w2")
    for others in (examples(ROWS[1:]), examples(share=False)):
        with pytest.raises(ValueError, match="of other examples.*delete it to have them computed"):
            tj.data.load_reference(path, others, "w1")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        tj.data.load_reference(path, examples(), "w1")


def test_examples_without_any_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="have no log-probabilities of a reference"):
        tj.data.save_reference(tmp_path / "a", examples(), "w")
    assert dataclasses.replace(examples()).reference is None
