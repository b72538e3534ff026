"""VeRA: one pair of random projections for all matrices, scaled by two trained vectors of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dense, matmul
from trainjax.peft import _low_rank as low_rank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    checked_dropout,
    drawn,
    dropout_keys,
    dropped,
    merged,
    replaced,
    targets,
)
from trainjax.types import Frozen, Params, Peft, PeftFiles, Weight, pytree, static

AXES = {"d": (None,), "b": ("out",)}
_SHARED = "projections"  # in the adapter, beside the names of matrices
_A, _B = "base_model.vera_A", "base_model.vera_B"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings; see `vera`."""

    rank: int
    target: str
    d_initial: float
    dropout: float


@pytree
class Vera(Weight):
    """`x @ w + (dropout(x) @ A * d) @ B * b`, A and B being the first rows and columns of the shared ones.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        shared_a, shared_b: the projections, as wide as the widest matrix; in a model's stack of layers
            one for each, since a scan takes its part of every array.
        d, b: the trained vectors, of each matrix of the stack.
        key: turns dropout on; one key for each matrix of the stack. None in evaluation.
        dropout: probability that an input of the update (not of `w`) is zeroed.
    """

    w: Any
    shared_a: Float[Array, "*copies widest_in rank"]
    shared_b: Float[Array, "*copies rank widest_out"]
    d: Float[Array, "*stack rank"]
    b: Float[Array, "*stack out"]
    key: Key[Array, "*stack"] | None = None
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        a, b = self._projections()
        # Vectors scale activations: scaled projections would have gradients of the projections' size.
        inner = self.d * matmul(dropped(x, self.key, self.dropout), a).astype(jnp.float32)
        update = self.b * matmul(inner.astype(x.dtype), b).astype(jnp.float32)
        return (matmul(x, self.w).astype(jnp.float32) + update).astype(x.dtype)

    def _projections(self) -> tuple[Array, Array]:
        *_, fan_in, fan_out = self.shape
        return self.shared_a[..., :fan_in, :], self.shared_b[..., :fan_out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`w + A diag(d) B diag(b)`, in float32."""
        a, b = self._projections()
        return dense(self.w) + (a * self.d[..., None, :]) @ (b * self.b[..., None, :])


def vera(
    rank: int = 256, target: str = ALL_LINEAR, *, d_initial: float = 0.1, dropout: float = 0.0
) -> Peft:
    """`W + A diag(d) B diag(b)`: `A` and `B` drawn once for all matrices, `d` and `b` trained for each.

    `A` and `B` are as wide as the widest matrix and the others take their first rows and columns; uniform
    with variance `2 / fan_in` (kaiming), a `Frozen` part of the adapter. `d` starts at `d_initial` and `b`
    at zero, so the adapter starts as the identity. Files hold the projections.

    Args:
        rank: inner size of the update; it may be above a matrix's sides.
        target: regex over parameter names such as `layers/attention/query/kernel`.
        d_initial: where `d` starts.
        dropout: on the update's input, in training only.

    Raises:
        ValueError: rank below 1; dropout outside [0, 1); a regex that matches nothing.

    Source: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2. Agrees with PEFT 0.21 `VeraModel`.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: a rank is at least 1")
    return _method(Settings(rank, target, float(d_initial), checked_dropout(dropout)))


@functools.cache
def _method(config: Settings) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: Settings, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        *stack, _, fan_out = w.shape
        d = jnp.full((*stack, config.rank), config.d_initial, jnp.float32)
        return {"d": d, "b": jnp.zeros((*stack, fan_out), jnp.float32)}

    found = targets(params, config.target)
    widest = (max(w.shape[axis] for w in found.values()) for axis in (-2, -1))
    return drawn(key, found, draw, AXES) | {_SHARED: _projections(key, config.rank, *widest)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _projections(key: PRNGKeyArray, rank: int, fan_in: int, fan_out: int) -> dict[str, Frozen]:
    def uniform(name: str, shape: tuple[int, int]) -> Frozen:
        bound = (6 / shape[0]) ** 0.5
        key_of = tree.key_for(key, f"{_SHARED}/{name}")
        return Frozen(jax.random.uniform(key_of, shape, jnp.float32, -bound, bound))

    return {"a": uniform("a", (fan_in, rank)), "b": uniform("b", (rank, fan_out))}


def _split(adapter: Params) -> tuple[Params, dict[str, Array]]:
    """The vectors by matrix, and the projections."""
    vectors = {name: part for name, part in adapter.items() if name != _SHARED}
    return vectors, tree.thawed(adapter[_SHARED])


def _attach(
    config: Settings, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    vectors, shared = _split(adapter)

    @functools.cache  # one array for all matrices of as many layers
    def stacked(part: str, stack: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(shared[part], (*stack, *shared[part].shape))

    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Vera:
        stack = tuple(w.shape[:-2])
        keys = dropout_keys(key, config.dropout, name, stack)
        a, b = stacked("a", stack), stacked("b", stack)
        return Vera(w, a, b, parts["d"], parts["b"], keys, config.dropout)

    return replaced(params, vectors, leaf)


def _merge(config: Settings, params: Params, adapter: Params) -> Params:
    vectors, shared = _split(adapter)

    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        return merged(Vera(w, shared["a"], shared["b"], parts["d"], parts["b"]), w)

    return replaced(params, vectors, leaf)


# The format of the PEFT library, in which projections are transposed: vera_A is [rank, in].

_READ = {"r", "d_initial", "vera_dropout", "save_projection", "projection_prng_key", "init_weights"}


def _export(config: Settings, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    vectors, shared = _split(adapter)
    tensors = {
        _A: np.ascontiguousarray(np.asarray(shared["a"]).T),
        _B: np.ascontiguousarray(np.asarray(shared["b"]).T),
    }
    for full, vector in tree.flatten(vectors).items():
        name, _, part = full.rpartition("/")
        for index in np.ndindex(*vector.shape[:-1]):
            module = modules[tree.numbered(name, index)]
            tensors[f"{module}.vera_lambda_{part}"] = np.ascontiguousarray(vector[index])
    last = {name.split(".")[-2] for name in tensors if ".vera_lambda_" in name}
    fields = {
        "peft_type": "VERA",
        "r": config.rank,
        "target_modules": sorted(last),
        "d_initial": config.d_initial,
        "vera_dropout": config.dropout,
        "save_projection": True,
        "projection_prng_key": 0,  # of no effect beside saved projections; PEFT wants one
        "init_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    return PeftFiles(fields, tensors)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of VeRA.

    A layer of a stack that the file leaves out gets vectors of zeros, which stay.

    Args:
        files: settings, the projections, and vectors by `<module>.vera_lambda_b`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes.

    Raises:
        ValueError: no projections in the file; a setting that changes the function and is not supported,
            a tensor of a module that the model does not have, a shape that does not fit, a number that is
            not finite; each by name.
    """
    if files.fields.get("peft_type") != "VERA":
        return None
    fields, tensors = files.fields, dict(files.tensors)
    low_rank.check_fields(fields, _READ)
    if _A not in tensors or _B not in tensors:
        raise ValueError(
            "the adapter's file has no projections vera_A and vera_B (save_projection=False), and torch's "
            "random numbers are not made here; save it in PEFT with save_projection=True"
        )
    a, b = (_finite(name, tensors.pop(name)) for name in (_A, _B))
    rank = fields["r"]
    if a.shape[0] < rank or b.shape[1] < rank:
        raise ValueError(f"vera_A {a.shape} and vera_B {b.shape} do not fit r={rank}")
    widest = a.shape[1], b.shape[0]
    adapter: dict[str, Any] = {}
    for name, w in tree.flatten(params).items():
        sizes = {"d": rank, "b": w.shape[-1]} if name.endswith("kernel") else {}
        read = {
            part: _vectors(name, part, w, size, modules, tensors) for part, size in sizes.items()
        }
        adapter |= {f"{name}/{part}": vector for part, vector in read.items() if vector is not None}
        if f"{name}/b" in adapter and (w.shape[-2] > widest[0] or w.shape[-1] > widest[1]):
            raise ValueError(
                f"vera_A {a.shape} and vera_B {b.shape} are narrower than {name}, {w.shape[-2]} x "
                f"{w.shape[-1]}; is the adapter for another model?"
            )
    low_rank.refuse_unknown(tensors)
    names = "|".join(dict.fromkeys(name.rpartition("/")[0] for name in adapter))
    dropout = float(fields.get("vera_dropout") or 0.0)
    config = Settings(rank, f"^({names})$", float(fields.get("d_initial", 0.1)), dropout)
    shared = {"a": Frozen(jnp.asarray(a[:rank].T)), "b": Frozen(jnp.asarray(b[:, :rank].T))}
    return _method(config), tree.unflatten(adapter) | {_SHARED: shared}


def _vectors(
    name: str,
    part: str,
    w: Any,
    size: int,
    modules: Mapping[str, str],
    tensors: dict[str, np.ndarray],
) -> Array | None:
    """The vectors of a stack of matrices, zeros where the file has none; None where it has none at all."""
    stack = w.shape[:-2]
    found = np.zeros((*stack, size), np.float32)
    is_there = False
    for index in np.ndindex(*stack):
        tensor = f"{modules.get(tree.numbered(name, index), '')}.vera_lambda_{part}"
        if tensor not in tensors:
            continue
        vector = _finite(tensor, tensors.pop(tensor))
        if vector.shape != (size,):
            raise ValueError(
                f"{tensor} {vector.shape} does not fit {name}, where it has {size} numbers; is the "
                "adapter for another model?"
            )
        found[index], is_there = vector, True
    return jnp.asarray(found) if is_there else None


def _finite(name: str, tensor: np.ndarray) -> np.ndarray:
    tensor = np.asarray(tensor, np.float32)
    if not np.isfinite(tensor).all():
        raise ValueError(f"the adapter's {name} holds NaN or infinite numbers")
    return tensor
