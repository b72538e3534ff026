"""trainjax: post-training of language models in JAX.

The few names that a notebook needs; they are imported when they are first used, so that importing the
package takes no longer than importing nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainjax import data as data
    from trainjax import estimate as estimate
    from trainjax import evals as evals
    from trainjax import losses as losses
    from trainjax import merging as merging
    from trainjax import models as models
    from trainjax import optim as optim
    from trainjax import parallel as parallel
    from trainjax import peft as peft
    from trainjax import quant as quant
    from trainjax import rollout as rollout
    from trainjax import train as train
    from trainjax import tree as tree
    from trainjax.models import from_linen as from_linen
    from trainjax.models import from_nnx as from_nnx
    from trainjax.models import load as load
    from trainjax.models import load_adapter as load_adapter
    from trainjax.models import load_scorer as load_scorer
    from trainjax.models import save_adapter as save_adapter
    from trainjax.models import save_gguf as save_gguf
    from trainjax.models import save_model as save_model
    from trainjax.models import save_scorer as save_scorer
    from trainjax.parallel.mesh import mesh as mesh
    from trainjax.policies import policy as policy
    from trainjax.policies import reference as reference
    from trainjax.rollout import generate as generate
    from trainjax.scorers import init_scorer as init_scorer
    from trainjax.scorers import scorer as scorer

_HOMES = {
    "from_linen": "trainjax.models",
    "from_nnx": "trainjax.models",
    "generate": "trainjax.rollout",
    "init_scorer": "trainjax.scorers",
    "load": "trainjax.models",
    "load_adapter": "trainjax.models",
    "load_scorer": "trainjax.models",
    "mesh": "trainjax.parallel",
    "policy": "trainjax.policies",
    "reference": "trainjax.policies",
    "save_adapter": "trainjax.models",
    "save_gguf": "trainjax.models",
    "save_model": "trainjax.models",
    "save_scorer": "trainjax.models",
    "scorer": "trainjax.scorers",
}
_MODULES = {
    *("data", "estimate", "evals", "losses", "merging", "models", "optim"),
    *("parallel", "peft", "quant", "rollout", "train", "tree"),
}
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"trainjax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
