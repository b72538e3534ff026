"""Put an adapter into its model's weights, as a folder that transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainjax import models, quant, tree
from trainjax.nn import body
from trainjax.recipes import _common as common
from trainjax.types import Params, Peft


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a model folder whose weights are the base's with the adapter added, a reward model's too."""

    model: str
    """The base that the adapter was trained on."""
    adapter: Path
    """The adapter's folder, in PEFT's format."""
    out: Path
    """Folder to write; it must not exist yet."""
    dtype: common.DtypeName | None = None
    """Of the weights written; by default as the base's are stored."""
    base_format: common.BaseFormatName | None = None
    """Add to the weights as this format keeps them: what an adapter was trained on that had it."""
    other_base: bool = False
    """Accept an adapter that was trained on another base of the same shape."""


def main(config: Config) -> None:
    """Runs the job."""
    if models.is_scorer(config.adapter):
        _merge_scorer(config)
    else:
        _merge(config)
    print(config.out)


def _merge(config: Config) -> None:
    model = common.load_model(config.model, dtype=config.dtype, base_format=config.base_format)
    method, adapter = models.load_adapter(config.adapter, model, other_base=config.other_base)
    models.save_model(config.out, model, _merged(config, method, model.params, adapter))


def _merge_scorer(config: Config) -> None:
    model, method, params = common.load_scorer(
        config.model,
        dtype=config.dtype,
        adapter=config.adapter,
        other_base=config.other_base,
        base_format=config.base_format,
    )
    assert method is not None  # there is an adapter
    merged = _merged(config, method, body(model.params), params["body"])
    models.save_scorer(config.out, model, None, {**params, "body": merged})


def _merged(config: Config, method: Peft, params: Params, adapter: Params) -> Params:
    """The sum as plain arrays; quantised matrices as what they stand for, in the embedding's dtype."""
    merged = method.merge(params, adapter)
    if config.base_format is None:
        return merged
    return tree.cast(quant.dense(merged), params["embed"]["embedding"].dtype)
