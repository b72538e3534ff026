"""Supervised fine-tuning: the formula, and the loss and gradients of transformers with PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import families, helpers
from trainjax import tree
from trainjax.losses import sft
from trainjax.losses.sft import nll
from trainjax.models import load, load_adapter, save_adapter
from trainjax.policies import policy


def test_loss_is_the_weighted_negative_log_likelihood():
    logprobs = jnp.asarray([[-1.0, -2.0], [-3.0, -5.0]])
    weights = jnp.asarray([[0.5, 0.25], [0.0, 0.25]])
    assert float(nll(logprobs, weights)) == 0.5 * 1 + 0.25 * 2 + 0.25 * 5


def test_loss_and_accuracy_are_those_of_all_the_logits():
    """Token t is predicted from what is before it, and the first is nobody's target."""
    model, batch = helpers.tiny(), helpers.random_batch(rows=2)
    loss, metrics = jax.jit(sft(policy(model)))(model.params, batch)
    logits = np.asarray(model.logits(batch["tokens"]), np.float64)[:, :-1]
    targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, -(weights * chosen).sum(), rtol=1e-6)
    hits = (weights * (logits.argmax(-1) == targets)).sum()
    np.testing.assert_allclose(metrics["mean_token_accuracy"], hits, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.ADAPTERS)
def test_loss_and_gradients_are_those_of_transformers_with_peft(tmp_path, name):
    """Prompts masked with -100, rows of several lengths padded on the right."""
    import torch

    family, settings = families.ADAPTERS[name]
    base = families.torch_model(family)
    base.save_pretrained(tmp_path / "base")
    theirs = families.torch_adapter(base, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (4, 12)).astype(np.int32)
    at, lengths, prompts = (
        np.arange(12)[None],
        np.array([[12], [7], [9], [3]]),
        np.array([[4], [1], [6], [2]]),
    )
    trained = (at >= prompts) & (at < lengths)
    labels = torch.from_numpy(np.where(trained, tokens, -100)).long()
    mask = torch.from_numpy((at < lengths).astype(np.int64))
    out = theirs(torch.from_numpy(tokens).long(), attention_mask=mask, labels=labels)
    out.loss.backward()

    model = load(tmp_path / "base")
    method, adapter = load_adapter(tmp_path / "adapter", model)
    batch = {"tokens": tokens, "weights": (trained / trained.sum()).astype(np.float32)}
    loss, gradients = helpers.loss_and_gradients(sft(policy(model, method)), adapter, batch)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=0, atol=1e-5)
    save_adapter(tmp_path / "gradients", model, method, tree.unflatten(gradients))
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    helpers.assert_close({name: ours[name] for name in expected}, expected, 1e-5)
