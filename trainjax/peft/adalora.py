"""AdaLoRA: an update in the form of a singular value decomposition, whose rank goes where it matters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.peft import _low_rank as low_rank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    checked_dropout,
    drawn,
    dropout_keys,
    grouped,
    merged,
    replaced,
    targets,
)
from trainjax.peft._rank_budget import RankBudget, with_budget
from trainjax.peft.lora import Lora
from trainjax.types import Metrics, Params, Peft, PeftFiles

AXES = low_rank.AXES | {"e": (None,)}


@dataclasses.dataclass(frozen=True)
class AdaLora:
    """The settings; see `adalora`."""

    rank: int
    initial_rank: int
    alpha: float
    target: str
    budget: RankBudget
    orthogonality: float
    dropout: float

    def scale(self) -> float:
        """PEFT divides by the rank that there was at the start, plus its epsilon."""
        return self.alpha / (self.initial_rank + 1e-5)


def adalora(
    rank: int = 8,
    initial_rank: int | None = None,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    warmup: int = 0,
    final: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
    dropout: float = 0.0,
) -> Peft:
    """`W + (alpha / initial_rank) A diag(e) B`, singular values `e` being set to zero as the budget falls.

    All matrices begin with `initial_rank` singular values and keep `rank` on average. A value matters as
    much as its own importance and the mean ones of its two vectors say: the smoothed `|w g|` times its
    smoothed deviation. The budget falls by a cubic from step `warmup` to step `steps - final`; there the
    values are chosen for good. `transform` does this in the optimizer's state, with the gradients that the
    step hands over (before clipping). `penalty` keeps the vectors orthonormal: `orthogonality` times the
    mean of `|A^T A - I|` and `|B B^T - I|`, Frobenius norms. `A` and `B` start normal with standard
    deviation 0.02 and `e` at zero, so the adapter starts as the identity.

    Args:
        rank: mean rank at the end (`target_r` in PEFT).
        initial_rank: of each matrix at the start (`init_r`); by default half as much again.
        alpha: numerator of the scale, whose denominator is `initial_rank` throughout.
        target: regex over parameter names such as `layers/attention/query/kernel`.
        warmup: steps before the budget falls (`tinit`).
        final: steps after it has fallen (`tfinal`).
        every: steps between two choices of values (`deltaT`).
        beta1, beta2: of the smoothing of importance and of its deviation.
        orthogonality: weight of the penalty (`orth_reg_weight`).
        dropout: on the update's input, in training only.

    Raises:
        ValueError: ranks below 1, the initial one below the other or above a matrix's sides; steps below
            0, `every` below 1, betas outside (0, 1), a negative weight; dropout outside [0, 1); a regex
            that matches nothing. From `transform`: fewer steps than `warmup` and `final` take.

    Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3-4, 8-12. Agrees with PEFT 0.21 `AdaLoraModel`,
    steps counted from 1.
    """
    initial_rank = rank * 3 // 2 if initial_rank is None else initial_rank
    if not 1 <= rank <= initial_rank:
        raise ValueError(
            f"rank={rank} and initial_rank={initial_rank}: the rank at the end is from 1 to the initial"
        )
    if orthogonality < 0:
        raise ValueError(f"orthogonality={orthogonality}: the penalty's weight is at least 0")
    budget = RankBudget(rank, initial_rank, warmup, final, every, beta1, beta2)
    weight, dropout = float(orthogonality), checked_dropout(dropout)
    return _method(AdaLora(rank, initial_rank, float(alpha), target, budget, weight, dropout))


@functools.cache
def _method(config: AdaLora) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config),
        bind(_attach, config),
        bind(_merge, config),
        bind(_export, config),
        bind(_penalty, config),
        bind(with_budget, config.budget),
    )


def _init(config: AdaLora, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        *stack, fan_in, fan_out = w.shape
        rank, (key_a, key_b) = config.initial_rank, jax.random.split(key)
        return {
            "a": 0.02 * jax.random.normal(key_a, (*stack, fan_in, rank), jnp.float32),
            "b": 0.02 * jax.random.normal(key_b, (*stack, rank, fan_out), jnp.float32),
            "e": jnp.zeros((*stack, rank), jnp.float32),
        }

    found = targets(params, config.target)
    for name, w in found.items():
        fan_in, fan_out = w.shape[-2:]
        if config.initial_rank > min(fan_in, fan_out):
            raise ValueError(
                f"initial_rank={config.initial_rank} is above the sides of {name}, {fan_in} x {fan_out}; "
                f"at most {min(fan_in, fan_out)} adds anything"
            )
    return drawn(key, found, draw, AXES)


def _weight(
    config: AdaLora, key: PRNGKeyArray | None, name: str, w: Any, parts: Mapping[str, Array]
) -> Lora:
    stack = w.shape[:-2]
    a = parts["a"] * parts["e"][..., None, :]
    scale = jnp.full(stack, config.scale(), jnp.float32)
    keys = dropout_keys(key, config.dropout, name, stack)
    return Lora(w, a, parts["b"], scale, keys, config.dropout)


def _attach(
    config: AdaLora, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    return replaced(params, adapter, functools.partial(_weight, config, key))


def _merge(config: AdaLora, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        return merged(_weight(config, None, name, w, parts), w)

    return replaced(params, adapter, leaf)


def _penalty(
    config: AdaLora, adapter: Params, reports: Any, rows: Any
) -> tuple[Float[Array, ""], Metrics]:
    """The mean over all vectors' matrices of the distance of their products from the identity."""
    distances = []
    for parts in grouped(adapter).values():
        a, b = parts["a"], parts["b"]
        products = jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)
        distances += [_from_identity(product).reshape(-1) for product in products]
    mean = jnp.mean(jnp.concatenate(distances))
    return config.orthogonality * mean, {"orthogonality": mean}


def _from_identity(product: Float[Array, "*stack rank rank"]) -> Float[Array, "*stack"]:
    squared = jnp.sum((product - jnp.eye(product.shape[-1])) ** 2, axis=(-1, -2))
    # A root has no gradient at zero, where the vectors are orthonormal to the last digit.
    return jnp.sqrt(jnp.maximum(squared, float(jnp.finfo(jnp.float32).tiny)))


# The format of the PEFT library: lora_A is [rank, in], lora_E [rank, 1], without the values at zero.

_READ = {
    *("r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2"),
    *("orth_reg_weight", "lora_alpha", "lora_dropout", "rank_pattern"),
}


def _export(config: AdaLora, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    groups, tensors, pattern = grouped(adapter), {}, {}
    # Before anything was trained all values are zero, and none of them was left out of the budget.
    fresh = not any(np.any(np.asarray(parts["e"])) for parts in groups.values())
    for name, parts in groups.items():
        a, b, e = (np.asarray(parts[part]) for part in "abe")
        for index in np.ndindex(*e.shape[:-1]):
            module, kept = modules[tree.numbered(name, index)], (e[index] != 0) | fresh
            tensors[f"{module}.lora_A"] = np.ascontiguousarray(a[index].T[kept])
            tensors[f"{module}.lora_B"] = np.ascontiguousarray(b[index].T[:, kept])
            tensors[f"{module}.lora_E"] = np.ascontiguousarray(e[index][kept, None])
            pattern[f"{module}.lora_E"] = kept.tolist()
    budget = config.budget
    fields = {
        "peft_type": "ADALORA",
        "init_r": config.initial_rank,
        "target_r": config.rank,
        "tinit": budget.warmup,
        "tfinal": budget.final,
        "deltaT": budget.every,
        "beta1": budget.beta1,
        "beta2": budget.beta2,
        "orth_reg_weight": config.orthogonality,
        # Of the run and not of the adapter; PEFT refuses a configuration without a possible one.
        "total_step": budget.warmup + budget.final + 1,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": None if fresh else pattern,
        "target_modules": sorted({name.split(".")[-2] for name in tensors}),
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    return PeftFiles(fields, tensors)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of AdaLoRA.

    Singular values outside `rank_pattern`, and those of layers that the file leaves out, are zeros with
    vectors of zeros, which stay.

    Args:
        files: settings, and tensors by `<module>.lora_A`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that changes the function and is not supported, a tensor of a module that
            the model does not have, a shape that does not fit, a number that is not finite; each by name.
    """
    if files.fields.get("peft_type") != "ADALORA":
        return None
    fields, tensors = files.fields, dict(files.tensors)
    low_rank.check_fields(fields, _READ)
    adapter: dict[str, Any] = {}
    for name, w in tree.flatten(params).items():
        *stack, fan_in, fan_out = w.shape if name.endswith("kernel") else (0, 0)
        rank = fields["init_r"]
        sizes = {"a": (fan_in, rank), "b": (rank, fan_out), "e": (rank,)}
        parts = {part: np.zeros((*stack, *size), np.float32) for part, size in sizes.items()}
        for index in np.ndindex(*stack):
            module = modules.get(tree.numbered(name, index), "")
            three = [tensors.pop(f"{module}.lora_{part}", None) for part in "ABE"]
            if any(tensor is not None for tensor in three):
                kept = _kept(fields, module, rank)
                a, b, e = _checked(module, three, (fan_in, fan_out), int(kept.sum()))
                parts["a"][index][:, kept], parts["b"][index][kept] = a.T, b.T
                parts["e"][index][kept] = e[:, 0]
                adapter |= {f"{name}/{part}": value for part, value in parts.items()}
    low_rank.refuse_unknown(tensors)
    names = "|".join(dict.fromkeys(name.rpartition("/")[0] for name in adapter))
    method = _method(_settings(fields, f"^({names})$"))
    return method, tree.unflatten(jax.tree.map(jnp.asarray, adapter))


def _kept(fields: Mapping[str, Any], module: str, rank: int) -> np.ndarray:
    """Which of a module's singular values are in the file."""
    pattern = (fields.get("rank_pattern") or {}).get(f"{module}.lora_E", [True] * rank)
    if len(pattern) != rank:
        raise ValueError(
            f"rank_pattern has {len(pattern)} entries for {module}; with init_r={rank} there are {rank}"
        )
    return np.asarray(pattern, bool)


def _checked(module: str, three: Any, sides: tuple[int, int], rank: int) -> list[np.ndarray]:
    if any(tensor is None for tensor in three):
        raise ValueError(f"the adapter has not all of lora_A, lora_B and lora_E for {module}")
    a, b, e = (np.asarray(tensor, np.float32) for tensor in three)
    if (a.shape, b.shape, e.shape) != ((rank, sides[0]), (sides[1], rank), (rank, 1)):
        raise ValueError(
            f"{module}: lora_A {a.shape}, lora_B {b.shape} and lora_E {e.shape} do not fit a matrix of "
            f"{sides[0]} inputs and {sides[1]} outputs with {rank} singular values; is the adapter for "
            "another model?"
        )
    for part, tensor in zip("ABE", (a, b, e), strict=True):
        if not np.isfinite(tensor).all():
            raise ValueError(f"{module}: lora_{part} holds NaN or infinite numbers")
    return [a, b, e]


def _settings(fields: Mapping[str, Any], target: str) -> AdaLora:
    given = lambda name, default: fields.get(name, default)  # noqa: E731
    rank, initial_rank = fields["target_r"], fields["init_r"]
    steps = given("tinit", 0), given("tfinal", 0), given("deltaT", 1)
    budget = RankBudget(
        rank, initial_rank, *steps, float(given("beta1", 0.85)), float(given("beta2", 0.85))
    )
    alpha, weight = float(fields["lora_alpha"]), float(given("orth_reg_weight", 0.5))
    dropout = float(given("lora_dropout", 0.0) or 0.0)
    return AdaLora(rank, initial_rank, alpha, target, budget, weight, dropout)
