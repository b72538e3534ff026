"""What methods with two thin factors have in common: ranks, scales, the start, and PEFT's files of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.peft._ends import EMBEDDING
from trainjax.peft._matrices import Parts, checked_dropout, per_matrix, targets
from trainjax.types import Params, PeftFiles

AXES = {"a": ("in", None), "b": (None, "out")}
"""How the factors are laid out: A follows its matrix along the inputs, B along the outputs."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The settings of `W + scale A B`; see `peft.lora`."""

    rank: int
    alpha: float
    target: str
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rslora: bool = False
    dropout: float = 0.0

    def targets(self, params: Params, more: Collection[str] = ()) -> dict[str, Any]:
        """The matrices that get an update, kernels or leaves of the names in `more`.

        Raises:
            ValueError: a regex that matches nothing; a rank that is below 1 or above a matrix's sides.
        """
        found = targets(params, self.target, more)
        _check_patterns(self, found)
        for name, w in found.items():
            _check_ranks(name, self.ranks(name, w.shape[:-2]), *w.shape[-2:])
        return found

    def ranks(self, name: str, stack: Sequence[int]) -> np.ndarray:
        """The rank of each matrix of a stack."""
        return per_matrix(self.rank_pattern, self.rank, name, stack)

    def alphas(self, name: str, stack: Sequence[int]) -> np.ndarray:
        """The alpha of each matrix of a stack."""
        return per_matrix(self.alpha_pattern, self.alpha, name, stack)

    def scales(self, name: str, stack: Sequence[int]) -> Float[Array, "*stack"]:
        """`alpha / rank` of each matrix of a stack, or `alpha / sqrt(rank)`."""
        ranks = self.ranks(name, stack)
        scales = self.alphas(name, stack) / (np.sqrt(ranks) if self.rslora else ranks)
        return jnp.asarray(scales, jnp.float32)


def low_rank(
    rank: int,
    alpha: float,
    target: str,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    rslora: bool,
    dropout: float,
) -> LowRank:
    """The settings, as a user gives them.

    Raises:
        ValueError: dropout outside [0, 1).
    """
    patterns = tuple((rank_pattern or {}).items()), tuple((alpha_pattern or {}).items())
    return LowRank(rank, float(alpha), target, *patterns, rslora, checked_dropout(dropout))


def factors(config: LowRank, key: PRNGKeyArray, name: str, w: Any) -> Parts:
    """`A` uniform in `±1/sqrt(in)` and `B` at zero, of one stack of matrices."""
    *stack, fan_in, fan_out = w.shape
    ranks, bound = config.ranks(name, stack), fan_in**-0.5
    rank = int(ranks.max())
    uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    a = uniform(key, (*stack, fan_in, rank), jnp.float32)
    # A smaller rank in a stack is columns of zeros in A and in B: their gradients are
    # products of each other, so they stay zero whatever the optimizer.
    a = jnp.where(np.arange(rank) < ranks[..., None, None], a, 0.0)
    return {"a": a, "b": jnp.zeros((*stack, rank, fan_out), jnp.float32)}


def _check_patterns(config: LowRank, found: Mapping[str, Any]) -> None:
    names = [
        tree.numbered(name, index)
        for name, w in found.items()
        for index in np.ndindex(*w.shape[:-2])
    ]
    for kind in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, kind):
            if not any(tree.regex(pattern).search(name) for name in names):
                raise ValueError(
                    f"{kind}: {pattern!r} matches no matrix with an adapter; they are "
                    f"{', '.join(found)}, with the layer's number in it as in {names[0]}"
                )


def _check_ranks(name: str, ranks: np.ndarray, fan_in: int, fan_out: int) -> None:
    if ranks.min() < 1:
        raise ValueError(f"rank={ranks.min()} for {name}: a rank is at least 1")
    if ranks.max() > min(fan_in, fan_out):
        raise ValueError(
            f"rank={ranks.max()} is above the sides of {name}, {fan_in} x {fan_out}; "
            f"at most {min(fan_in, fan_out)} adds anything"
        )


# The format of the PEFT library, in which factors are transposed: lora_A is [rank, in].

_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern"),
}
WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size"),
}
"""Fields of a configuration of PEFT that tell where parts went, how they began, who made them."""
_BASE_IS_KEPT = (True, False, None, "gaussian")  # values of init_lora_weights; others change W


def export(config: LowRank, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    """The factors as PEFT's LoRA has them; other parts of the adapter are left to the method."""
    named = tree.flatten(tree.thawed(adapter))
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
    tensors, found = {}, set()
    for name in dict.fromkeys(name.rpartition("/")[0] for name in named):
        a, b = np.asarray(named[f"{name}/a"]), np.asarray(named[f"{name}/b"])
        stack = a.shape[:-2]
        ranks, alphas = config.ranks(name, stack), config.alphas(name, stack)
        for index in np.ndindex(*stack):
            module = modules[tree.numbered(name, index)]
            rank, alpha = int(ranks[index]), float(alphas[index])
            first, second = (tensor_name(name, module, part) for part in "AB")
            tensors[first] = np.ascontiguousarray(a[index][:, :rank].T)
            tensors[second] = np.ascontiguousarray(b[index][:rank].T)
            found.add(module.rpartition(".")[2])
            if rank != config.rank:
                fields["rank_pattern"][module] = rank
            if alpha != config.alpha:
                fields["alpha_pattern"][module] = alpha
    return PeftFiles(fields | {"target_modules": sorted(found)}, tensors)


def tensor_name(name: str, module: str, part: str) -> str:
    """PEFT's name of a factor, `A` or `B`, of our matrix: those of an embedding are called otherwise."""
    if name == EMBEDDING:
        return f"{module}.lora_embedding_{part}"
    return f"{module}.lora_{part}.weight"


def read(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[LowRank, dict[str, Array], dict[str, np.ndarray]]:
    """The settings, the factors by name, and the tensors that are not factors, of PEFT's LoRA.

    Args:
        files: settings, and tensors by `<module>.lora_A.weight`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that changes the function and is not supported, a shape that does not
            fit; each by name.
    """
    fields, tensors = files.fields, dict(files.tensors)
    check_fields(fields, _READ)
    adapter: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, w in tree.flatten(params).items():
        found = {}
        for index in np.ndindex(*w.shape[:-2]):
            full = tree.numbered(name, index)
            module = modules.get(full, "")
            both = [tensors.pop(tensor_name(name, module, part), None) for part in "AB"]
            if all(factor is None for factor in both):
                continue
            found[index] = _checked_factors(module, both, w.shape[-2:])
            ranks[full] = found[index][0].shape[1]
            alpha = _peft_pattern(fields, "alpha_pattern", module, fields["lora_alpha"])
            alphas[full] = float(alpha)
        if found:
            adapter[f"{name}/a"], adapter[f"{name}/b"] = _, b = _stacked(found, w.shape)
            for index in np.ndindex(
                *w.shape[:-2]
            ):  # layers that PEFT left out are zeros of full width
                ranks.setdefault(tree.numbered(name, index), b.shape[-2])
    names = "|".join(dict.fromkeys(name.rpartition("/")[0] for name in adapter))
    config = LowRank(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        target=f"^({names})$",
        rank_pattern=_exceptions(ranks, fields["r"]),
        alpha_pattern=_exceptions(alphas, fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(fields.get("lora_dropout") or 0.0),
    )
    return config, adapter, tensors


def refuse_unknown(tensors: Mapping[str, Any]) -> None:
    """Says which tensor of an adapter nobody took.

    Raises:
        ValueError: there is one.
    """
    if tensors:
        raise ValueError(
            f"the adapter holds {next(iter(tensors))!r}, which fits no module of the model"
        )


def check_fields(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses settings that change the function and that nobody reads.

    Raises:
        ValueError: a field that is set, is not among the known ones and has an effect in PEFT.
    """
    for key, value in fields.items():
        if key in known or key in WITHOUT_EFFECT or value in (None, False, "none", {}, []):
            continue
        if key == "init_lora_weights" and value in _BASE_IS_KEPT:
            continue
        raise ValueError(
            f"the adapter's configuration sets {key}={value!r}, which is not supported"
        )


def _checked_factors(
    module: str, both: Sequence[np.ndarray | None], sides: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one matrix in our layout, `[in, rank]` and `[rank, out]`."""
    a, b = both
    if a is None or b is None:
        raise ValueError(f"the adapter has only one of lora_A and lora_B for {module}")
    if (a.shape[1], b.shape[0]) != tuple(sides) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{module}: lora_A {a.shape} and lora_B {b.shape} do not fit a matrix of "
            f"{sides[0]} inputs and {sides[1]} outputs; is the adapter for another model?"
        )
    for part, tensor in zip("AB", both, strict=True):
        if not np.isfinite(np.asarray(tensor, np.float32)).all():
            raise ValueError(f"{module}: lora_{part} holds NaN or infinite numbers")
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
