"""LoRA-FA: LoRA whose first factor stays as it was drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from jaxtyping import PRNGKeyArray

from trainjax import tree
from trainjax.peft._matrices import ALL_LINEAR
from trainjax.peft.lora import lora
from trainjax.types import Frozen, Params, Peft, PeftFiles


def lora_fa(
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`W + (alpha / rank) A B` with `A` frozen as it was drawn; `B` alone trains.

    Neither a gradient nor optimizer state of `A`. The files are LoRA's and hold both factors, so they load
    in PEFT, and here as `lora`, in which both train.

    Args:
        rank, alpha, target, rank_pattern, alpha_pattern, rslora, dropout: as in `lora`.

    Raises:
        ValueError: as `lora`.

    Source: Zhang et al. 2023, arXiv:2308.03303, section 3. The optimizer of that name in PEFT 0.21
    also multiplies the gradient of `B` by `(A^T A)^-1`, which the paper's method does not.
    """
    plain = lora(
        rank,
        alpha,
        target,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        rslora=rslora,
        dropout=dropout,
    )
    return _frozen(plain)


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _frozen(plain: Peft) -> Peft:
    return plain._replace(init=functools.partial(_init, plain.init))


def _init(init: Callable[..., Params], key: PRNGKeyArray, params: Params) -> Params:
    named = tree.flatten(init(key, params))
    return tree.unflatten(
        {name: Frozen(x) if name.endswith("/a") else x for name, x in named.items()}
    )


def from_peft(files: PeftFiles, modules: Mapping[str, str], params: Params) -> None:
    """None: nothing in LoRA's files says which factor trained, and `lora` reads them."""
    return
