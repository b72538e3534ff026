"""The PEFT library beside ours: one base and one adapter in both, and how both train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import trainjax as tj
from tests import families, helpers
from trainjax import losses
from trainjax.models import Model
from trainjax.policies import policy
from trainjax.train import init, make_step
from trainjax.types import Params, Peft

STEPS = 20
TOKENS = np.random.default_rng(1).integers(3, 48, (3, 14)).astype(np.int32)
BATCHES = np.random.default_rng(2).integers(3, 48, (STEPS, 2, 14)).astype(np.int32)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(folder: Path, family: str = "llama_grouped") -> Model:
    """A tiny random model, whose folder both libraries read."""
    families.torch_model(family).save_pretrained(folder)
    return tj.load(folder)


def pretrained(folder: Path) -> Any:
    """The base in transformers."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def wrapped(folder: Path, config: Any, noise: str | None = "") -> Any:
    """PEFT's wrapper of the base; what trains gets noise where its name contains `noise`."""
    import peft
    import torch

    model = peft.get_peft_model(pretrained(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and noise is not None and noise in name:
                rng = np.random.default_rng([*name.encode()])
                parameter.add_(torch.from_numpy(0.1 * rng.standard_normal(parameter.shape)).float())
    return model.eval()


def loaded(folder: Path, adapter: Path) -> Any:
    """PEFT's wrapper of the base with an adapter's files."""
    import peft

    return peft.PeftModel.from_pretrained(pretrained(folder), adapter).eval()


def logits(model: Any) -> np.ndarray:
    """Of `TOKENS`, by a model of torch."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def our_logits(model: Model, method: Peft, adapter: Params) -> np.ndarray:
    """Of `TOKENS`, by ours."""
    return np.asarray(model.with_params(method.attach(model.params, adapter)).logits(TOKENS))


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within the tolerance of the largest logit."""
    helpers.assert_close({"logits": found}, {"logits": expected}, tolerance)


def assert_same_both_ways(
    tmp_path: Path, config: Any, family: str = "llama_grouped", tolerance: float = 1e-5
) -> None:
    """An adapter of PEFT with noise on all that trains: the same function here, merged, and back there."""
    model = base(tmp_path / "base", family)
    theirs = wrapped(tmp_path / "base", config)
    theirs.save_pretrained(tmp_path / "theirs")
    method, adapter = tj.load_adapter(tmp_path / "theirs", model)
    expected = logits(theirs)
    assert_same(our_logits(model, method, adapter), expected, tolerance)
    merged = model.with_params(method.merge(model.params, adapter))
    assert_same(np.asarray(merged.logits(TOKENS)), expected, tolerance)
    tj.save_adapter(tmp_path / "ours", model, method, adapter)
    assert_same(logits(loaded(tmp_path / "base", tmp_path / "ours")), expected, tolerance)
    assert np.abs(expected - logits(pretrained(tmp_path / "base"))).max() > 0.1


def trace(
    model: Any, optimizer: Any, after_step: Callable[[int], None] = lambda step: None
) -> np.ndarray:
    """The losses of 20 steps in torch; the loss is the mean over all targets."""
    import torch

    model.train()
    values = []
    for number, tokens in enumerate(BATCHES, 1):
        ids = torch.from_numpy(tokens).long()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(number)
        values.append(loss.item())
    return np.asarray(values)


def adamw(model: Any, learning_rate: float, weight_decay: float = 0.0) -> Any:
    """AdamW of torch over what trains."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)


def our_trace(
    model: Model, method: Peft, adapter: Params, tx: optax.GradientTransformation
) -> tuple[np.ndarray, Any]:
    """The losses of the same 20 steps here, the method's own term included, and the last state."""
    if method.transform is not None:
        tx = method.transform(STEPS, tx)
    actor = policy(model, method)
    loss = losses.sft(actor)
    if method.penalty is not None:
        loss = loss + losses.adapter_penalty(actor)
    state, step, values = init(adapter, tx), make_step(tx), []
    weights = np.ones(BATCHES.shape[1:], np.float32)
    weights[:, 0] = 0.0
    for tokens in BATCHES:
        batch = {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(weights / weights.sum())}
        state, metrics = step(state, loss, batch)
        values.append(float(metrics["loss"]))
    return np.asarray(values), state


def assert_same_trace(
    tmp_path: Path, config: Any, learning_rate: float = 1e-2, family: str = "llama_grouped"
) -> None:
    """20 steps of AdamW from PEFT's start with noise: the same losses within 1e-4."""
    model = base(tmp_path / "base", family)
    theirs = wrapped(tmp_path / "base", config)
    theirs.save_pretrained(tmp_path / "theirs")
    method, adapter = tj.load_adapter(tmp_path / "theirs", model)
    expected = trace(theirs, adamw(theirs, learning_rate))
    found, _ = our_trace(model, method, adapter, optax.adamw(learning_rate, weight_decay=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert expected[-1] != expected[0]
