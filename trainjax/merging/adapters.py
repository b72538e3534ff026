"""LoRA adapters of one base merged into one, in PEFT's format; the base itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from trainjax.io import folder
from trainjax.io import peft as files
from trainjax.merging.method import Method, checked_weights, merge_tensor, total
from trainjax.types import PeftFiles


class Update(NamedTuple):
    """What an adapter adds to a matrix: `scale * b @ a`, with the factors as PEFT stores them."""

    a: Float32[np.ndarray, "rank in"]
    b: Float32[np.ndarray, "out rank"]
    scale: float = 1.0


Combine = Callable[[Sequence[Update], Sequence[float]], Update]
"""`(updates, weights) -> update`: what several adapters add to a matrix, as one update of scale 1."""


def cat(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """`sum_i w_i update_i` exactly: the factors side by side, so that ranks add up.

    Source: agrees with PEFT 0.21 `add_weighted_adapter(combination_type="cat")`.
    """
    pairs = list(zip(updates, weights, strict=True))
    a = [update.a * np.float32(weight * update.scale) for update, weight in pairs]
    return Update(np.concatenate(a), np.concatenate([update.b for update in updates], axis=1))


def linear(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """`sum_i sign(c_i) sqrt|c_i| a_i` and `sum_i sqrt|c_i| b_i` for c_i = w_i scale_i: factors summed.

    Cheap and rough: the product of the sums has terms of every pair of adapters.

    Raises:
        ValueError: adapters of different ranks.

    Source: agrees with PEFT 0.21 `add_weighted_adapter(combination_type="linear")`.
    """
    if len(ranks := {len(update.a) for update in updates}) > 1:
        raise ValueError(
            f"factors of the ranks {sorted(ranks)} cannot be added; cat and svd merge them"
        )
    shares = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    roots = [np.float32(abs(share) ** 0.5) for share in shares]
    signed = [np.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
    a = total(root * update.a for root, update in zip(signed, updates, strict=True))
    return Update(a, total(root * update.b for root, update in zip(roots, updates, strict=True)))


def svd(rank: int | None = None) -> Combine:
    """The best approximation of `sum_i w_i update_i` of a rank; no matrix of the base's size is made.

    With `B A = Q_b R_b (Q_a R_a)^T` the singular vectors are those of the small `R_b R_a^T`, turned.

    Args:
        rank: of the result; by default the largest of the adapters' ranks. Where all adapters together
            have a smaller one, that.

    Raises:
        ValueError: a rank below 1.

    Source: agrees with PEFT 0.21 `add_weighted_adapter(combination_type="svd")`, which decomposes the
    product.
    """
    _check_rank(rank)

    def combine(updates: Sequence[Update], weights: Sequence[float]) -> Update:
        a, b, _ = cat(updates, weights)
        q_b, r_b = np.linalg.qr(b.astype(np.float64))
        q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
        left, singular, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return _truncated(q_b @ left, singular, right @ q_a.T, rank or _largest_rank(updates))

    return combine


def dense_svd(method: Callable[[Sequence[float]], Method], rank: int | None = None) -> Combine:
    """The best approximation of a rank of what a method makes of the updates as dense matrices.

    Args:
        method: by weights a method for task vectors: `lambda weights: ties(weights, 0.5)`.
        rank: as in `svd`.

    Raises:
        ValueError: a rank below 1.

    Source: with `ties(weights, density, consensus=counted_mean)` it agrees with PEFT 0.21
    `add_weighted_adapter(combination_type="ties_svd")`.
    """
    _check_rank(rank)

    def combine(updates: Sequence[Update], weights: Sequence[float]) -> Update:
        deltas = [np.float32(update.scale) * (update.b @ update.a) for update in updates]
        merged = merge_tensor(method(weights), np.zeros_like(deltas[0]), deltas)
        decomposed = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
        return _truncated(*decomposed, rank or _largest_rank(updates))

    return combine


def merge_adapters(
    out: str | Path,
    combine: Combine,
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    other_base: bool = False,
) -> None:
    """Writes an adapter's folder in PEFT's format that stands for several of the same base.

    An adapter without factors for a matrix has no part in it. The result has `lora_alpha = r`, so its
    scale is 1, and it is in float32. The folder appears whole or not at all.

    Args:
        out: the folder; it may exist if it is empty.
        combine: `cat`, `svd(rank)` and the like.
        adapters: their folders.
        weights: one for each; by default 1.
        other_base: accept adapters that were trained here on different bases.

    Raises:
        ValueError: not a plain LoRA; factors that do not fit one another; a wrong number of weights;
            numbers that are not finite; different bases; a folder that holds something.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters")
    read = [files.read(Path(adapter)) for adapter in adapters]
    fingerprints = {fingerprint for _, fingerprint in read}
    known = sorted(fingerprint for fingerprint in fingerprints if fingerprint is not None)
    if len(known) > 1 and not other_base:
        raise ValueError(
            f"the adapters {', '.join(map(str, adapters))} were trained on different bases (fingerprints "
            f"{', '.join(known)}); say that it is meant: other_base"
        )
    every = [_updates(str(label), found) for label, (found, _) in zip(adapters, read, strict=True)]
    merged = _merged(combine, list(map(str, adapters)), every, checked_weights(weights))
    exported = _exported([found.fields for found, _ in read], merged)
    with folder.written(Path(out)) as temporary:
        files.write(temporary, exported, fingerprints.pop() if len(fingerprints) == 1 else None)


def _merged(
    combine: Combine,
    labels: Sequence[str],
    every: Sequence[Mapping[str, Update]],
    weights: Sequence[float],
) -> dict[str, Update]:
    merged = {}
    for module in sorted(set().union(*every)):
        having = [i for i, own in enumerate(every) if module in own]
        updates = [every[i][module] for i in having]
        _check_sides(module, dict(zip([labels[i] for i in having], updates, strict=True)))
        merged[module] = combine(updates, [weights[i] for i in having])
    return merged


def _check_sides(module: str, updates: Mapping[str, Update]) -> None:
    (first, one), *others = updates.items()
    for label, other in others:
        sides, expected = ((u.b.shape[0], u.a.shape[1]) for u in (other, one))
        if sides != expected:
            raise ValueError(
                f"{module}: {label} is for a matrix of {sides[0]} x {sides[1]}, {first} for one of "
                f"{expected[0]} x {expected[1]}; only adapters of one base can be merged"
            )


def _truncated(left: np.ndarray, singular: np.ndarray, right: np.ndarray, rank: int) -> Update:
    b = left[:, :rank] * singular[:rank]
    return Update(right[:rank].astype(np.float32), b.astype(np.float32))


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: a rank is at least 1")


def _largest_rank(updates: Sequence[Update]) -> int:
    return max(len(update.a) for update in updates)


# PEFT's files.

_ENDS = re.compile(r"(.+)\.lora_([AB])\.weight")
_READ = {"peft_type", "lora_alpha", "use_rslora", "alpha_pattern", "init_lora_weights"}
_WITHOUT_EFFECT = {  # on what is in the tensors: their ranks and places, dropout, who made them
    *(
        "r",
        "rank_pattern",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ),
    *("layers_pattern", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "megatron_core", "qalora_group_size"),
}
_BASE_IS_KEPT = (True, False, None, "gaussian")  # values of init_lora_weights; others change W


def _updates(label: str, found: PeftFiles) -> dict[str, Update]:
    """By module what an adapter adds, if it is plain LoRA."""
    fields = found.fields
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"{label} is an adapter of peft_type={fields.get('peft_type')!r}; LORA is merged"
        )
    for key, value in fields.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "none", {}, []):
            raise ValueError(f"{label} sets {key}={value!r}, which cannot be merged")
    if fields.get("init_lora_weights") not in _BASE_IS_KEPT:
        raise ValueError(
            f"{label} sets init_lora_weights={fields['init_lora_weights']!r}: its base is not the model "
            "that it names"
        )
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in found.tensors.items():
        if not (match := _ENDS.fullmatch(name)):
            raise ValueError(f"{label} holds {name!r}; only factors of plain LoRA can be merged")
        factors.setdefault(match[1], {})[match[2]] = _finite(label, name, tensor)
    return dict(_with_scales(label, fields, factors))


def _finite(label: str, name: str, tensor: np.ndarray) -> np.ndarray:
    wide = tensor.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} of {label} holds NaN or infinite numbers")
    return wide


def _with_scales(
    label: str, fields: Mapping[str, Any], factors: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, Update]]:
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[-1]:
            raise ValueError(f"{label}: lora_A and lora_B of {module} do not fit one another")
        rank = len(pair["A"])
        scale = _alpha(fields, module) / (rank**0.5 if fields.get("use_rslora") else rank)
        yield module, Update(pair["A"], pair["B"], scale)


def _alpha(fields: Mapping[str, Any], module: str) -> float:
    """By PEFT's rule: a pattern matches the end of the module's path, at a dot."""
    patterns = (fields.get("alpha_pattern") or {}).items()
    found = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module))
    return float(next(found, fields.get("lora_alpha", 8)))  # 8 is PEFT's default


def _exported(fields: Sequence[Mapping[str, Any]], merged: Mapping[str, Update]) -> PeftFiles:
    rank = max(len(update.a) for update in merged.values())
    others = {module: len(u.a) for module, u in merged.items() if len(u.a) != rank}
    kept = {key: fields[0].get(key) for key in ("task_type", "base_model_name_or_path")}
    tensors = {}
    for module, update in merged.items():
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(update.a)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(update.b)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(fields, merged),
    }
    return PeftFiles(kept | settings, tensors)


def _targets(fields: Sequence[Mapping[str, Any]], modules: Mapping[str, Update]) -> list[str]:
    """The ends of the modules' names where the adapters said no more, else the full names."""
    plain = all(isinstance(own.get("target_modules"), list) for own in fields)
    if plain and not any(own.get("layers_to_transform") for own in fields):
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules)
