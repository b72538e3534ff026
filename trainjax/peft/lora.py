"""LoRA: a frozen matrix plus a trained product of two thin ones."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dense, low_rank, matmul
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree, static

ALL_LINEAR = r"^layers/"
"""Every matrix of every layer: attention and feed-forward, not embeddings and head."""


@pytree
class Lora(Weight):
    """`x @ w + dropout(x) @ a @ b * scale`: a matrix with a low-rank update, kept apart.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        a, b: the update's factors, with the same leading axes.
        scale: one number for each matrix of the stack.
        key: turns dropout on; one key for each matrix of the stack. None in evaluation.
        dropout: probability that an input of the update (not of `w`) is zeroed.
    """

    w: Any
    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack rank out"]
    scale: Float[Array, "*stack"]
    key: Key[Array, "*stack"] | None = None
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        b = (self.b * self.scale[..., None, None]).astype(x.dtype)
        return matmul(x, self.w) + low_rank(self._dropped(x), self.a.astype(x.dtype), b)

    def _dropped(self, x: Array) -> Array:
        if self.key is None or not self.dropout:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`w + a b scale`, in float32."""
        return dense(self.w) + self.a @ (self.b * self.scale[..., None, None])


@dataclasses.dataclass(frozen=True)
class _Config:
    rank: int
    alpha: float
    target: str
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rslora: bool
    dropout: float


def lora(
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`W + (alpha / rank) A B` on the matrices whose name matches `target`.

    `A` starts uniform in `±1/sqrt(in)` (kaiming with a = sqrt 5, as in PEFT) and `B` at zero, so the
    adapter starts as the identity. Both train in float32; the base stays as it was loaded.

    Args:
        rank: inner size of the update.
        alpha: numerator of its scale.
        target: regex over parameter names such as `layers/attention/query/kernel`.
        rank_pattern, alpha_pattern: other values for the matrices whose name, with the layer's
            number in it (`layers/3/mlp/up/kernel`), matches a regex; the first match wins.
        rslora: scale by `alpha / sqrt(rank)` instead, which keeps the update's size when the rank
            grows (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: on the update's input, in training only.

    Raises:
        ValueError: rank below 1 or above a matrix's sides; dropout outside [0, 1); a regex that
            matches nothing.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3. Agrees with PEFT 0.21 `LoraLayer`.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a probability below 1")
    patterns = tuple((rank_pattern or {}).items()), tuple((alpha_pattern or {}).items())
    return _lora(_Config(rank, float(alpha), target, *patterns, rslora, dropout))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _lora(config: _Config) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    targets = _targets(config, params)
    _check_patterns(config, targets)
    ranks = {
        name: _per_matrix(config.rank_pattern, config.rank, name, w.shape[:-2])
        for name, w in targets.items()
    }
    for name, w in targets.items():
        _check_ranks(name, ranks[name], *w.shape[-2:])

    def factors(key: PRNGKeyArray) -> Params:
        adapter = {}
        for name, w in targets.items():
            *stack, fan_in, fan_out = w.shape
            rank, bound = int(ranks[name].max()), fan_in**-0.5
            uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
            a = uniform(tree.key_for(key, name), (*stack, fan_in, rank), jnp.float32)
            # A smaller rank in a stack is columns of zeros in A and in B: their gradients are
            # products of each other, so they stay zero whatever the optimizer.
            adapter[f"{name}/a"] = jnp.where(np.arange(rank) < ranks[name][..., None, None], a, 0.0)
            adapter[f"{name}/b"] = jnp.zeros((*stack, rank, fan_out), jnp.float32)
        return tree.unflatten(adapter)

    return jax.jit(factors, out_shardings=_shardings(targets))(key)


def _shardings(targets: Mapping[str, Any]) -> Params | None:
    """A follows its matrix along the inputs and B along the outputs; the rank is never split."""
    found: dict[str, NamedSharding] = {}
    for name, w in targets.items():
        sharding = getattr(w, "sharding", None)
        if isinstance(sharding, NamedSharding):
            mesh, spec = sharding.mesh, tuple(sharding.spec)
            *stack, rows, columns = spec + (None,) * (len(w.shape) - len(spec))
            found[f"{name}/a"] = NamedSharding(mesh, PartitionSpec(*stack, rows, None))
            found[f"{name}/b"] = NamedSharding(mesh, PartitionSpec(*stack, None, columns))
    return tree.unflatten(found) if len(found) == 2 * len(targets) else None


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    def leaf(name: str, w: Any, a: Array, b: Array) -> Lora:
        stack = w.shape[:-2]
        keys = None
        if key is not None and config.dropout:
            keys = jax.random.split(tree.key_for(key, name), stack)
        return Lora(w, a, b, _scales(config, name, stack), keys, config.dropout)

    return _with_factors(leaf, params, adapter)


def _merge(config: _Config, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, a: Array, b: Array) -> Array:
        # Over a quantised base in float32: the sum is of the dequantised matrix that the adapter saw.
        dtype = w.dtype if isinstance(w, jax.Array) else jnp.float32
        return Lora(w, a, b, _scales(config, name, w.shape[:-2])).dense().astype(dtype)

    return _with_factors(jax.jit(leaf, static_argnums=0), params, adapter)


def _with_factors(leaf: Any, params: Params, adapter: Params) -> Params:
    factors = tree.flatten(adapter)
    named = tree.flatten(params)
    names = dict.fromkeys(name.rpartition("/")[0] for name in factors)
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"the adapter has {unknown[0]!r}, which the model does not")
    leaves = {
        name: leaf(name, named[name], factors[f"{name}/a"], factors[f"{name}/b"]) for name in names
    }
    return tree.replace(params, leaves)


def _targets(config: _Config, params: Params) -> dict[str, Any]:
    matrices = {name: w for name, w in tree.flatten(params).items() if name.endswith("kernel")}
    return tree.select(matrices, config.target)


def _check_patterns(config: _Config, targets: Mapping[str, Any]) -> None:
    names = [
        tree.numbered(name, index)
        for name, w in targets.items()
        for index in np.ndindex(*w.shape[:-2])
    ]
    for kind in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, kind):
            if not any(tree.regex(pattern).search(name) for name in names):
                raise ValueError(
                    f"{kind}: {pattern!r} matches no matrix with an adapter; they are "
                    f"{', '.join(targets)}, with the layer's number in it as in {names[0]}"
                )


def _check_ranks(name: str, ranks: np.ndarray, fan_in: int, fan_out: int) -> None:
    if ranks.min() < 1:
        raise ValueError(f"rank={ranks.min()} for {name}: a rank is at least 1")
    if ranks.max() > min(fan_in, fan_out):
        raise ValueError(
            f"rank={ranks.max()} is above the sides of {name}, {fan_in} x {fan_out}; "
            f"at most {min(fan_in, fan_out)} adds anything"
        )


def _per_matrix(
    pattern: Sequence[tuple[str, Any]], default: Any, name: str, stack: Sequence[int]
) -> np.ndarray:
    """The value for each matrix of a stack: of the first pattern that matches its full name."""
    values = np.full(tuple(stack), default)
    if pattern:
        for index in np.ndindex(*stack):
            full = tree.numbered(name, index)
            found = (value for key, value in pattern if tree.regex(key).search(full))
            values[index] = next(found, default)
    return values


def _scales(config: _Config, name: str, stack: Sequence[int]) -> Float[Array, "*stack"]:
    ranks = _per_matrix(config.rank_pattern, config.rank, name, stack)
    alphas = _per_matrix(config.alpha_pattern, config.alpha, name, stack)
    return jnp.asarray(alphas / (np.sqrt(ranks) if config.rslora else ranks), jnp.float32)


# The format of the PEFT library, in which factors are transposed: lora_A is [rank, in].

_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
_WITHOUT_EFFECT = {  # where the factors went, how they began, who made them
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size"),
}
_BASE_IS_KEPT = (True, False, None, "gaussian")  # values of init_lora_weights; others change W


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    factors = tree.flatten(adapter)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors, targets = {}, set()
    for name in dict.fromkeys(name.rpartition("/")[0] for name in factors):
        a, b = np.asarray(factors[f"{name}/a"]), np.asarray(factors[f"{name}/b"])
        stack = a.shape[:-2]
        ranks = _per_matrix(config.rank_pattern, config.rank, name, stack)
        alphas = _per_matrix(config.alpha_pattern, config.alpha, name, stack)
        for index in np.ndindex(*stack):
            module, rank, alpha = (
                modules[tree.numbered(name, index)],
                int(ranks[index]),
                float(alphas[index]),
            )
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[index][:, :rank].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[index][:rank].T)
            targets.add(module.rpartition(".")[2])
            if rank != config.rank:
                fields["rank_pattern"][module] = rank
            if alpha != config.alpha:
                fields["alpha_pattern"][module] = alpha
    return PeftFiles(fields | {"target_modules": sorted(targets)}, tensors)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of plain LoRA.

    Args:
        files: settings, and tensors by `<module>.lora_A.weight`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that changes the function and is not supported, a tensor of a module
            that the model does not have, a shape that does not fit; each by name.
    """
    fields, tensors = files.fields, dict(files.tensors)
    if fields.get("peft_type") != "LORA" or fields.get("use_dora"):
        return None
    _check_fields(fields)
    adapter: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, w in tree.flatten(params).items():
        found = {}
        for index in np.ndindex(*w.shape[:-2]):
            full = tree.numbered(name, index)
            module = modules.get(full, "")
            factors = [tensors.pop(f"{module}.lora_{part}.weight", None) for part in "AB"]
            if all(factor is None for factor in factors):
                continue
            found[index] = _checked_factors(module, factors, w.shape[-2:])
            ranks[full] = found[index][0].shape[1]
            alpha = _peft_pattern(fields, "alpha_pattern", module, fields["lora_alpha"])
            alphas[full] = float(alpha)
        if found:
            adapter[f"{name}/a"], adapter[f"{name}/b"] = _, b = _stacked(found, w.shape)
            for index in np.ndindex(
                *w.shape[:-2]
            ):  # layers that PEFT left out are zeros of full width
                ranks.setdefault(tree.numbered(name, index), b.shape[-2])
    if tensors:
        raise ValueError(
            f"the adapter holds {next(iter(tensors))!r}, which fits no module of the model"
        )
    names = "|".join(dict.fromkeys(name.rpartition("/")[0] for name in adapter))
    config = _Config(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        target=f"^({names})$",
        rank_pattern=_exceptions(ranks, fields["r"]),
        alpha_pattern=_exceptions(alphas, fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(fields.get("lora_dropout") or 0.0),
    )
    return _lora(config), tree.unflatten(adapter)


def _check_fields(fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if key in _READ or key in _WITHOUT_EFFECT or value in (None, False, "none", {}, []):
            continue
        if key == "init_lora_weights" and value in _BASE_IS_KEPT:
            continue
        raise ValueError(
            f"the adapter's configuration sets {key}={value!r}, which is not supported"
        )


def _checked_factors(
    module: str, factors: Sequence[np.ndarray | None], sides: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one matrix in our layout, `[in, rank]` and `[rank, out]`."""
    a, b = factors
    if a is None or b is None:
        raise ValueError(f"the adapter has only one of lora_A and lora_B for {module}")
    if (a.shape[1], b.shape[0]) != tuple(sides) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{module}: lora_A {a.shape} and lora_B {b.shape} do not fit a matrix of "
            f"{sides[0]} inputs and {sides[1]} outputs; is the adapter for another model?"
        )
    return a.T, b.T


def _stacked(
    found: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray]], shape: Sequence[int]
) -> tuple[Array, Array]:
    """The factors of a stack of matrices as two arrays; smaller ranks and gaps are zeros."""
    *stack, fan_in, fan_out = shape
    rank = max(a.shape[1] for a, _ in found.values())
    all_a = np.zeros((*stack, fan_in, rank), np.float32)
    all_b = np.zeros((*stack, rank, fan_out), np.float32)
    for index, (a, b) in found.items():
        all_a[index][:, : a.shape[1]] = a
        all_b[index][: b.shape[0]] = b
    return jnp.asarray(all_a), jnp.asarray(all_b)


def _peft_pattern(fields: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's own rule: a pattern matches the end of the module's path, at a dot."""
    pattern = fields.get(key) or {}
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _exceptions(values: Mapping[str, Any], default: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((f"^{name}$", value) for name, value in values.items() if value != default)
