"""What programs have to know of the platform that they are compiled for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array

_R = TypeVar("_R")


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit` under which the platform runs our programs best.

    On CPU XLA rewrites bfloat16 arithmetic as float32 before it compiles, storage included: weights
    that a loop slices are held a second time, in float32, and cast back in every turn. The code
    generator needs none of it; without that pass a bfloat16 training step takes 0.8 of the time.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "float-normalization-bf16"}


def jit(f: Callable[..., _R], **options: Any) -> Callable[..., _R]:
    """`jax.jit` with `compiler_options()`, for functions at a module's top level.

    The platform is asked at the first call: an import must not start the devices.
    """

    @functools.cache
    def program() -> Callable[..., _R]:
        return jax.jit(f, compiler_options=compiler_options(), **options)

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> _R:
        return program()(*args, **kwargs)

    return call


def get(x: Array) -> np.ndarray:
    """The whole array on this host, of devices of other processes too: then all of them ask for it."""
    if x.is_fully_addressable:
        return np.asarray(jax.device_get(x))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def put(x: Any, layout: Sharding) -> Array:
    """`jax.device_put`, onto devices of other processes too, each of which has the same x.

    Every process copies its own shards. `device_put` would send all of x to every process, to compare
    them, and takes no array that is bound to a device.
    """
    if layout.is_fully_addressable:
        return jax.device_put(x, layout)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), layout)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, layout, lambda index: host[index])
