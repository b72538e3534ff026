"""Live comparison with PEFT of prompts and prefixes: the same function both ways, the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from tests import families, helpers
from tests.peft import contract
from trainjax import losses, tree
from trainjax.models import load, load_adapter, save_adapter
from trainjax.peft.p_tuning import p_tuning
from trainjax.peft.prefix import prefix
from trainjax.peft.prompt import prompt
from trainjax.policies import policy
from trainjax.train import init, make_step

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: deprecations of one another
]

TOKENS = np.random.default_rng(1).integers(0, 48, (3, 17)).astype(np.int32)
METHODS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "prompt": ("PromptTuningConfig", {}, prompt(3)),
    "p_tuning": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 5},
        p_tuning(3, encoder_hidden_size=5),
    ),
    "prefix": ("PrefixTuningConfig", {}, prefix(3)),
    "projection": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 5},
        prefix(3, prefix_projection=True, encoder_hidden_size=5),
    ),
}
"""By name: the configuration in PEFT, and the method here."""
NAMES = pytest.mark.parametrize("name", METHODS)
FAMILIES = pytest.mark.parametrize(
    "family", ["llama_grouped", "llama_biased_llama3", "llama_wide_heads", "mistral_window"]
)


def peft_model(base: Path, name: str) -> Any:
    """The saved base with PEFT's virtual tokens, all that trains drawn at random."""
    import peft

    kind, settings, _ = METHODS[name]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    return families.torch_randomised(
        peft.get_peft_model(pretrained(base), config).eval(), only="prompt_encoder"
    )


def pretrained(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path)


def torch_logits(model: Any) -> np.ndarray:
    """Of the text alone: prompts make PEFT return those of the virtual tokens too."""
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS).long()).logits.float().numpy()
    return found[:, -TOKENS.shape[1] :]


def assert_same_logits(found, expected, tolerance: float = 1e-5) -> None:
    helpers.assert_close({"logits": found}, {"logits": expected}, tolerance)


@FAMILIES
@NAMES
def test_virtual_tokens_of_peft_are_the_same_function_here(tmp_path, name, family):
    families.torch_model(family).save_pretrained(tmp_path / "base")
    theirs = peft_model(tmp_path / "base", name)
    theirs.save_pretrained(tmp_path / "adapter")
    base = load(tmp_path / "base")
    expected = torch_logits(theirs)
    assert_same_logits(
        load(tmp_path / "base", adapter=tmp_path / "adapter").logits(TOKENS), expected
    )
    assert np.abs(expected - base.logits(TOKENS)).max() > 0.1
    save_adapter(tmp_path / "ours", base, *load_adapter(tmp_path / "adapter", base))
    found, saved = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "adapter")
    )
    assert found.keys() == saved.keys()
    for tensor in found:
        np.testing.assert_array_equal(found[tensor], saved[tensor])


@FAMILIES
@NAMES
def test_virtual_tokens_made_here_are_the_same_function_in_peft(tmp_path, name, family):
    import peft

    families.torch_model(family).save_pretrained(tmp_path / "base")
    base, method = load(tmp_path / "base"), METHODS[name][2]
    adapter = contract.moved(method.init(jax.random.key(0), base.params), std=0.5)
    save_adapter(tmp_path / "adapter", base, method, adapter)
    theirs = peft.PeftModel.from_pretrained(pretrained(tmp_path / "base"), tmp_path / "adapter")
    found = base.with_params(method.attach(base.params, adapter)).logits(TOKENS)
    assert_same_logits(found, torch_logits(theirs))


def linear(layer: Any, stack: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """A layer of torch as ours are, kernels transposed; its outputs in the parts of a stack."""
    kernel, bias = (x.detach().numpy() for x in (layer.weight.T, layer.bias))
    kernel = kernel.reshape(kernel.shape[0], *stack, -1)
    return {"kernel": np.moveaxis(kernel, 0, -2), "bias": bias.reshape(*stack, -1)}


def same_start(theirs: Any, name: str, layers: int) -> Any:
    """PEFT's parameters as an adapter of ours."""
    encoder = theirs.prompt_encoder["default"]
    embedding = encoder.embedding.weight.detach().numpy()
    if name == "prompt":
        return {"prompt": {"embedding": embedding}}
    if name == "p_tuning":
        first, _, second, _, third = encoder.mlp_head
        parts = zip(("first", "second", "third"), (first, second, third), strict=True)
        return {"prompt": {"embedding": embedding, **{k: linear(v) for k, v in parts}}}
    if name == "prefix":
        both = embedding.reshape(3, layers, 2, -1).transpose(2, 1, 0, 3)
        return {"prefix": dict(zip(("key", "value"), both, strict=True))}
    hidden, _, last = encoder.transform
    both = linear(last, (layers, 2))
    parts = {n: {part: x[:, i] for part, x in both.items()} for i, n in enumerate(("key", "value"))}
    return {"prefix": {"embedding": embedding, "hidden": linear(hidden), **parts}}


@NAMES
def test_twenty_steps_of_training_are_those_of_torch(tmp_path, name):
    """AdamW with the same settings on the same batches of whole rows: losses within 1e-4."""
    import torch

    families.torch_model("llama_grouped").save_pretrained(tmp_path / "base")
    theirs, base = peft_model(tmp_path / "base", name), load(tmp_path / "base")
    batches = np.random.default_rng(2).integers(0, 48, (20, 4, 9)).astype(np.int32)
    weights = np.full((4, 9), 1 / 32, np.float32)
    weights[:, 0] = 0.0
    settings = {"eps": 1e-8, "weight_decay": 0.01}

    method, tx = METHODS[name][2], optax.adamw(3e-3, 0.9, 0.999, **settings)
    start = jax.tree.map(jnp.array, same_start(theirs, name, base.config.num_layers))
    expected = method.init(jax.random.key(0), base.params)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, expected)
    state, step, loss = init(start, tx), make_step(tx), losses.sft(policy(base, method))

    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=3e-3, **settings
    )
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == tree.count(start)
    found, values = [], []
    for tokens in batches:
        state, metrics = step(state, loss, {"tokens": tokens, "weights": weights})
        found.append(float(metrics["loss"]))
        ids = torch.from_numpy(tokens).long()
        logits = theirs(ids).logits[:, -9:-1]
        value = torch.nn.functional.cross_entropy(logits.reshape(-1, 48), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-4)
    assert values[-1] != values[0]
