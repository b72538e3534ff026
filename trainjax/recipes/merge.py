"""Put an adapter into its model's weights, or make one model, or one adapter, of several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trainjax import merging, models, quant, tree
from trainjax.nn import body
from trainjax.recipes import _common as common
from trainjax.recipes._merging import (
    OF_ADAPTERS,
    OF_MODELS,
    MethodName,
    check_read,
    named,
    settings,
)
from trainjax.types import Params, Peft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the model with --adapter in its weights, or what --method makes of --models or --adapters."""

    model: str | None = None
    """The base: that the adapter was trained on, or that the models to merge began as."""
    adapter: Path | None = None
    """An adapter's folder, in PEFT's format, to put into the base; a reward model's too."""
    models: tuple[str, ...] = ()
    """Models to merge: folders, .gguf files, hub ids. In timber the instruct model; in
    instruction_residual the base after further pretraining, then the instruct model."""
    adapters: tuple[Path, ...] = ()
    """LoRA adapters of one base, in PEFT's format, to merge into one adapter."""
    out: Path
    """Folder to write; it must not exist yet."""
    method: MethodName | None = None
    """How: linear, cat, svd or ties_svd for adapters; for models any but the last three."""
    weights: tuple[float, ...] = ()
    """One for each model or adapter, by default 1; below 0 takes away what it has learned."""
    density: float | None = None
    """Share of each difference from the base that is kept, in ties and dare."""
    normalize: bool = True
    """Divide by the sum of the weights, in linear of models."""
    scale: float = 1.0
    """Multiplies the merged difference in ties (lambda), and the instruction residual."""
    t: float | None = None
    """How far from the first model (0) to the second (1), in slerp."""
    gamma: float = 0.0
    """What timber leaves of the directions beyond the effective rank."""
    rank: int | None = None
    """Rank of the adapter in svd and ties_svd; by default the largest of those merged."""
    seed: int = 0
    """Random seed of what dare drops."""
    dtype: common.DtypeName | None = None
    """Dtype of a model's weights; by default as the base's are stored, or without one the first's."""
    base_format: common.BaseFormatName | None = None
    """Add to the weights as this format keeps them: what an adapter was trained on that had it."""
    tokenizer: str | None = None
    """Which of the models gives tokenizer and configuration; by default the instruct model where
    there is one, else the first with a chat template, the base before others."""
    other_base: bool = False
    """Accept adapters that were trained on another base of the same shape."""
    other_tokenizer: bool = False
    """Accept models to whose tokenizers an id is different tokens."""


def main(config: Config) -> None:
    """Runs the job."""
    write(config)
    print(config.out)


def write(config: Config) -> None:
    """Writes the folder."""
    jobs = {"adapter": _put_in, "models": _merge_models, "adapters": _merge_adapters}
    given = [job for name, job in jobs.items() if getattr(config, name)]
    if len(given) != 1:
        raise ValueError(
            "give --adapter to put one into --model, or --models or --adapters to merge several"
        )
    given[0](config)


def _put_in(config: Config) -> None:
    check_read(config, "--adapter", {"model", "adapter", "dtype", "base_format", "other_base"})
    if config.model is None or config.adapter is None:
        raise ValueError("--adapter needs --model, the base that it was trained on")
    if models.is_scorer(config.adapter):
        _put_into_scorer(config)
        return
    model = common.load_model(config.model, dtype=config.dtype, base_format=config.base_format)
    method, adapter = models.load_adapter(config.adapter, model, other_base=config.other_base)
    models.save_model(config.out, model, _merged(config, method, model.params, adapter))


def _put_into_scorer(config: Config) -> None:
    model, method, params = common.load_scorer(
        str(config.model),
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


def _merge_models(config: Config) -> None:
    make = named(OF_MODELS, config.method, "models")
    reads = {"model", "models", "dtype", "tokenizer", "other_tokenizer"}
    method = make(**settings(config, make, reads, len(config.models)))
    if method.needs_base and config.model is None:
        raise ValueError(f"--method {config.method} needs --model, the base that --models began as")
    if config.model is not None and not method.needs_base:
        raise ValueError(f"--method {config.method} has no base: give --model among --models")
    merging.merge_models(
        config.out,
        method,
        config.models,
        config.model,
        dtype=config.dtype and common.DTYPES[config.dtype],
        tokenizer=config.tokenizer,
        other_tokenizer=config.other_tokenizer,
    )


def _merge_adapters(config: Config) -> None:
    make = named(OF_ADAPTERS, config.method, "adapters")
    reads = {"adapters", "weights", "other_base"}
    merging.merge_adapters(
        config.out,
        make(**settings(config, make, reads, len(config.adapters))),
        config.adapters,
        config.weights or None,
        other_base=config.other_base,
    )
