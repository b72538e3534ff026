"""LoRA+: LoRA whose second factor learns faster than the first."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import optax

from trainjax import tree
from trainjax.peft._matrices import ALL_LINEAR
from trainjax.peft.lora import lora
from trainjax.types import Params, Peft, PeftFiles


def lora_plus(
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    ratio: float = 16.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`W + (alpha / rank) A B`, the learning rate of `B` being `ratio` times that of `A`.

    `transform` multiplies the updates of `B`, weight decay included: what a parameter group with its own
    learning rate does, also where the rate follows a schedule. The files are LoRA's, and read as `lora`.

    Args:
        rank, alpha, target, rank_pattern, alpha_pattern, rslora, dropout: as in `lora`.
        ratio: learning rate of `B` over that of `A`, which is the optimizer's.

    Raises:
        ValueError: a ratio that is not positive; as `lora`.

    Source: Hayou et al. 2024, arXiv:2402.12354, section 4. Agrees with PEFT 0.21
    `create_loraplus_optimizer` over matrices.
    """
    if not 0 < ratio < float("inf"):
        raise ValueError(
            f"ratio={ratio}: B's learning rate over A's is a positive number, such as 16"
        )
    plain = lora(
        rank,
        alpha,
        target,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        rslora=rslora,
        dropout=dropout,
    )
    return _method(plain, float(ratio))


@functools.cache
def _method(plain: Peft, ratio: float) -> Peft:
    return plain._replace(transform=functools.partial(_transform, ratio))


def _transform(
    ratio: float, steps: int, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    def leaf(name: str, update: Any) -> Any:
        return update * ratio if name.endswith("kernel/b") else update

    faster = optax.stateless(lambda updates, params: tree.map_named(leaf, updates))
    return optax.chain(tx, faster)


def from_peft(files: PeftFiles, modules: Mapping[str, str], params: Params) -> None:
    """None: nothing in LoRA's files says how fast a factor learned, and `lora` reads them."""
    return
