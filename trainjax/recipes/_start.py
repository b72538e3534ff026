"""What a run begins with: a model, an adapter's functions, and the adapter of an earlier run."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainjax import models, platform, policies, tree
from trainjax.io import peft as files
from trainjax.models import Model
from trainjax.recipes import _common as common
from trainjax.recipes._common import PeftConfig, say
from trainjax.recipes._configs import StepConfig, TrainConfig
from trainjax.recipes._layouts import like_matrix
from trainjax.types import Params, Peft


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        model: as it was loaded.
        method: how an adapter is attached; None where every weight trains.
        loaded: the adapter that training goes on with; None where it begins with a fresh one.
    """

    model: Model
    method: Peft | None
    loaded: Params | None = None

    def policy(self) -> policies.Policy:
        """The policy that trains."""
        return policies.policy(self.model, self.method)

    def reference(self) -> policies.Reference:
        """The policy before training: the model, with the adapter that was loaded if there is one."""
        if self.loaded is None:
            return policies.reference(self.model)
        return policies.reference(self.model, self.method, self.loaded)

    def fingerprint(self) -> str | None:
        """Eight hex digits of the adapter that was loaded."""
        return None if self.loaded is None else fingerprint(self.loaded)


def fingerprint(params: Params) -> str:
    """Eight hex digits of all numbers."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    return f"{functools.reduce(lambda sum_, data: zlib.crc32(data, sum_), leaves, 0):08x}"


def start(config: TrainConfig, model: Model) -> Start:
    """The model with a fresh adapter, with that of `--adapter`, or to train as a whole.

    Raises:
        ValueError: an adapter that does not fit the model, or was trained on another base.
    """
    if config.adapter is None:
        return Start(model, config.peft_method())
    method, loaded = models.load_adapter(config.adapter, model, other_base=config.other_base)
    return Start(model, method, laid_out(loaded, model))


def check(config: TrainConfig) -> None:
    """Tries the adapter, fresh or from its folder, before the model is loaded.

    Raises:
        ValueError: a setting that the model, --full or the adapter's own file contradicts.
    """
    if config.adapter is None:
        config.check_method()
    else:
        _check_adapter(config, config.adapter)


def first_params(config: StepConfig, start: Start) -> Params:
    """What trains, before the first step."""
    if start.loaded is not None:
        params = start.loaded
    elif start.method is None:
        params = tree.cast(start.model.params, jnp.float32)
    else:
        params = start.method.init(jax.random.key(config.seed), start.model.params)
    return tree.cast(params, common.DTYPES[config.param_dtype])


def laid_out(adapter: Params, model: Model) -> Params:
    """An adapter that was read from files, over the devices as one that `init` makes."""
    if model.module.mesh is None:
        return adapter
    base, whole = tree.flatten(model.params), NamedSharding(model.module.mesh, PartitionSpec())
    return tree.map_named(
        lambda name, x: platform.put(x, like_matrix(name, x, base, whole)), adapter
    )


def _check_adapter(config: TrainConfig, path: Path) -> None:
    """Compares what the flags say of an adapter with its own file.

    Raises:
        ValueError: a folder without an adapter; --full; a --peft flag that says otherwise.
    """
    if config.full:
        raise ValueError(
            f"--full trains every weight, and --adapter {path} one adapter; to train all weights from there "
            "on, put it into them with trainjax merge"
        )
    found, ours = files.read(path)
    theirs = _settings(found.fields)
    for name, value in given(config.peft).items():
        if theirs.get(name) != value:
            has = (
                f"has {name}={theirs[name]!r}" if name in theirs else "comes with its own settings"
            )
            raise ValueError(
                f"--peft.{name.replace('_', '-')} {value}: the adapter in {path} {has}; leave --peft out to "
                "go on with it, or --adapter to begin another"
            )
    base = found.fields.get("base_model_name_or_path")
    if ours is None and base and Path(base).name.lower() != Path(config.model).name.lower():
        say(f"{path} says that it was trained on {base}; it goes on over {config.model}")


def given(peft: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter that were given."""
    unset = PeftConfig()
    values = {name: getattr(peft, name) for name in PeftConfig.__dataclass_fields__}
    return {name: value for name, value in values.items() if value != getattr(unset, name)}


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's settings as the flags call them, from its `adapter_config.json`."""
    if "trainjax_method" in fields:
        return {**fields, "name": fields["trainjax_method"]}
    kind = str(fields.get("peft_type"))
    name = "dora" if fields.get("use_dora") else _KINDS.get(kind, kind.lower())
    return {"name": name} | {
        ours: fields[theirs]
        for ours, theirs in (_NAMES | _OWN_NAMES.get(name, {})).items()
        if theirs in fields
    }


_KINDS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
"""PEFT's name of a method where ours is another."""
_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "num_virtual_tokens": "num_virtual_tokens",
    "encoder_hidden_size": "encoder_hidden_size",
}
"""PEFT's name of each setting."""
_OWN_NAMES = {
    "adalora": {"rank": "target_r", "initial_rank": "init_r"},
    "vera": {"dropout": "vera_dropout", "d_initial": "d_initial"},
}
"""Where a method of PEFT has names of its own."""
