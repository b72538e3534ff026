"""Live comparison with PEFT: LoRA on a convolution of torch, and here on the same one of Flax."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import helpers
from trainjax.models import from_linen, from_nnx
from trainjax.peft import lora

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: deprecations of one another
]

SETTINGS = {
    "strides": {"strides": (2, 1), "padding": ((1, 1), (2, 2))},
    "valid": {"strides": 1, "padding": ((0, 0), (0, 0))},
}


X = np.random.default_rng(0).standard_normal((2, 9, 8, 6)).astype(np.float32)


@functools.cache
def of_peft(case: str) -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    return _of_peft(X, SETTINGS[case])


def _of_peft(x: np.ndarray, settings: dict) -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    """The arrays of a convolution with a trained adapter, its outputs, and gradients of its square."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    pads = tuple(low for low, _ in settings["padding"])
    layer = torch.nn.Conv2d(6, 10, (3, 2), stride=settings["strides"], padding=pads)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(layer), config)
    y = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    (y.square().sum() / 2).backward()
    named = dict(model.named_parameters())
    short = {
        "w": "base_layer.weight",
        "bias": "bias",
        "a": "lora_A.default.weight",
        "b": "lora_B.default.weight",
    }
    found = {
        key: next(p for n, p in named.items() if n.endswith(end)) for key, end in short.items()
    }
    arrays = {key: p.detach().numpy() for key, p in found.items()}
    grads = {key: found[key].grad.numpy() for key in "ab"}
    return arrays, y.permute(0, 2, 3, 1).detach().numpy(), grads


def matrix(weight: np.ndarray) -> np.ndarray:
    """torch's `[out, in, *window]` as ours, `[*window * in, out]`."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("case", SETTINGS)
def test_lora_of_a_convolution_and_its_gradients_are_pefts(kind, case):
    x, settings = X, SETTINGS[case]
    arrays, expected, grads = of_peft(case)
    if kind == "linen":
        module = nn.Conv(10, (3, 2), **settings)
        model = from_linen(module, jax.jit(module.init)(jax.random.key(0), x), x)
    else:
        model = from_nnx(nnx.Conv(6, 10, (3, 2), **settings, rngs=nnx.Rngs(0)))
    params = {"kernel": jnp.asarray(matrix(arrays["w"])), "bias": jnp.asarray(arrays["bias"])}
    adapter = {"kernel": {key: jnp.asarray(matrix(arrays[key])) for key in "ab"}}
    method = lora(rank=4, alpha=6.0, target="kernel")

    def half_square(adapter):
        y = model.apply(method.attach(params, adapter), x)
        return jnp.sum(y * y) / 2, y

    (_, found), gradient = jax.jit(jax.value_and_grad(half_square, has_aux=True))(adapter)
    helpers.assert_close({"y": found}, {"y": expected}, 1e-5)
    helpers.assert_close(gradient["kernel"], {k: matrix(g) for k, g in grads.items()}, 1e-5)
