"""What several tests share: tiny models, batches, meshes of a part of the devices, float64 references."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from trainjax import parallel, tree
from trainjax.io.fetch import fetched
from trainjax.models import Model
from trainjax.models._load import _module as module_of
from trainjax.models._model import abstract_params, fingerprint
from trainjax.nn import Decoder, DecoderConfig
from trainjax.nn.remat import full
from trainjax.train import init, make_step
from trainjax.train.step import Step
from trainjax.types import Batch, Loss, Params, Peft

GOLDEN = Path(__file__).parent / "golden"

TINY = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""A Llama with grouped heads; `query` and `output` are square, and no other size is shared."""


@contextlib.contextmanager
def jax_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """JAX's settings for a while; what was compiled under others is forgotten before and after."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax.clear_caches()


@functools.cache
def tiny(seed: int = 0, std: float = 0.25, **settings: Any) -> Model:
    """A random model whose function is far from linear: every parameter is random, norms around 1.

    At the usual initialisation (0.02) the layers hardly change the stream, and a mistake in one of
    them would hide below the tolerance. The numbers are the host's: no program initialises them.
    """
    given = {k: settings.pop(k) for k in ("mesh", "compute_dtype", "remat") if k in settings}
    hf = TINY | settings
    module = module_of(hf, given.get("mesh"), given.get("compute_dtype"), given.get("remat", full))
    params = randomised(_shapes(module.config), std, seed)
    if module.mesh is not None:
        params = parallel.place(params, module.mesh)
    return Model(module.config, module, params, None, hf, "random", fingerprint(params))


@functools.cache
def _shapes(config: DecoderConfig) -> Params:
    """Zeros in the place of the params, whatever mesh, dtype and remat a model has."""
    shapes = abstract_params(Decoder(config, jnp.dtype(jnp.float32)))
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def randomised(params: Params, std: float = 0.25, seed: int = 0) -> Params:
    """Every leaf drawn anew from its name and the seed, scales around 1; laid out as it was."""

    def leaf(name: str, old: jax.Array) -> jax.Array:
        noise = std * np.random.default_rng([seed, *name.encode()]).standard_normal(old.shape)
        new = noise + 1.0 if name.endswith("scale") else noise
        return jax.device_put(new.astype(old.dtype), old.sharding)

    return tree.map_named(leaf, params)


def trained(method: Peft, params: Params, std: float = 0.25, seed: int = 0) -> Params:
    """An adapter as training leaves it: B is random too, except in rows that pad a smaller rank."""
    first = method.init(jax.random.key(seed), params)
    named = tree.flatten(first)

    def leaf(name: str, new: jax.Array) -> jax.Array:
        module, _, factor = name.rpartition("/")
        a = np.asarray(named[f"{module}/a"])
        if factor == "a":
            return named[name]
        used = np.any(a != 0, axis=-2)[..., None]
        return jax.device_put(np.where(used, np.asarray(new), np.float32(0)), new.sharding)

    return tree.map_named(leaf, randomised(first, std, seed))


def random_batch(
    rows: int = 8, seq: int = 12, vocab: int = 61, seed: int = 0
) -> dict[str, np.ndarray]:
    """Unpacked rows of random tokens with random weights of which some are zero; they sum to 1."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, (rows, seq)) * (rng.random((rows, seq)) < 0.7)
    weights[:, 0] = 0.0
    return {
        "tokens": rng.integers(0, vocab, (rows, seq), np.int32),
        "weights": (weights / weights.sum()).astype(np.float32),
    }


def packed(examples: Sequence[np.ndarray], rows: Sequence[Sequence[int]], seq: int) -> Batch:
    """The examples laid out in rows, each target of equal weight; every first token is no target."""
    out = {k: np.zeros((len(rows), seq), np.int32) for k in ("tokens", "segments", "positions")}
    weights = np.zeros((len(rows), seq), np.float32)
    for row, members in enumerate(rows):
        at = 0
        for segment, member in enumerate(members, 1):
            here = slice(at, at + len(examples[member]))
            out["tokens"][row, here] = examples[member]
            out["segments"][row, here] = segment
            out["positions"][row, here] = np.arange(len(examples[member]))
            weights[row, at + 1 : here.stop] = 1.0
            at = here.stop
    return out | {"weights": weights / weights.sum()}


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the first devices, as many as it takes; `parallel.mesh` takes all there are."""
    count = data * fsdp * tensor
    devices = np.asarray(jax.devices()[:count]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


keep_gradients = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
"""An optimizer that changes nothing and whose state is the last gradient."""


@functools.cache
def gradient_step(accumulate: int = 1) -> Step:
    """One for all tests: a loss that another test of the process had is not compiled again."""
    return make_step(keep_gradients, accumulate=accumulate)


def loss_and_gradients(
    loss: Loss, params: Params, batch: Batch, accumulate: int = 1
) -> tuple[float, dict[str, np.ndarray]]:
    """What the jitted step computes, through its public interface."""
    state, metrics = gradient_step(accumulate)(init(params, keep_gradients), loss, batch)
    return float(metrics["loss"]), jax.device_get(tree.flatten(state.opt_state))


def assert_close(actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    """Equal names, and values within `tolerance` of the largest number of their own array (or of 1)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(
            np.asarray(actual[name]) / scale, np.asarray(value) / scale, 0, tolerance, err_msg=name
        )


def in_float64(f: Callable[..., Any], *args: Any) -> Any:
    """`f` of the arguments with their floats in float64, as numpy: what the exact answer is."""

    def widened(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return jax.device_get(f(*jax.tree.map(widened, args)))


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays that a program computes, those of its inner programs included."""
    found: set[tuple[int, ...]] = set()
    for equation in jaxpr.eqns:
        found |= {tuple(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape")}
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


def smollm2() -> Path:
    """The folder of the real model; skips the test where it was not fetched."""
    if path := fetched("smollm2-135m-instruct"):
        return path
    pytest.skip("no SmolLM2 on this machine: run `trainjax fetch smollm2-135m-instruct`")


def smollm2_gguf() -> Path:
    """The real model as a GGUF file; skips the test where it was not fetched, or not as one."""
    file = smollm2() / "model.gguf"
    if not file.is_file():
        pytest.skip("the model that was fetched is the hub's, not a GGUF file")
    return file
