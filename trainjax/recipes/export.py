"""Hand on a model or an adapter: a folder for transformers, a file for llama.cpp, PEFT's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from trainjax import models
from trainjax.io import gguf_write
from trainjax.io import peft as files
from trainjax.io.hub import open_checkpoint
from trainjax.models import Model
from trainjax.models._model import SCORE
from trainjax.recipes import _common as common
from trainjax.recipes import merge

TYPES = {
    "f16": gguf_write.F16,
    "q8_0": gguf_write.Q8_0,
    "f32": gguf_write.F32,
    "bf16": gguf_write.BF16,
}

TypeName = Literal["f16", "q8_0", "f32", "bf16"]
TargetName = Literal["hf", "gguf", "peft"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Writes a model, its adapter merged into it if there is one, or the adapter alone."""

    model: str
    """The model, or the base that the adapter was trained on."""
    to: TargetName
    """hf: a folder that transformers loads; gguf: a file for llama.cpp; peft: the adapter alone."""
    out: Path
    """Folder or file to write; it must not exist yet."""
    adapter: Path | None = None
    """An adapter's folder in PEFT's format, or the folder of the run that made it."""
    type: TypeName | None = None
    """Format of the matrices in a gguf file, f16 by default; q8_0 is half its size."""
    dtype: common.DtypeName | None = None
    """Dtype of the weights that the adapter goes into, and that hf writes; by default as they are stored."""
    other_base: bool = False
    """Accept an adapter that was trained on another base of the same shape."""


def main(config: Config) -> None:
    """Runs the job."""
    if config.type is not None and config.to != "gguf":
        raise ValueError(
            f"--type is of the matrices in a gguf file; give --dtype with --to {config.to}"
        )
    if config.dtype is not None and config.to == "peft":
        raise ValueError("an adapter is written in float32: --dtype is for --to hf and --to gguf")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ValueError(f"{config.out} exists already; give the name of a new folder or file")
    TARGETS[config.to](config)
    print(config.out)


def _hf(config: Config) -> None:
    if config.adapter is not None:
        merge.write(_merging(config, config.adapter))
    elif _scores(config.model):
        model, _, params = common.load_scorer(config.model, dtype=config.dtype)
        models.save_scorer(config.out, model, None, params)
    else:
        models.save_model(config.out, common.load_model(config.model, dtype=config.dtype))


def _gguf(config: Config) -> None:
    kind = TYPES[config.type or "f16"]
    if config.out.is_dir() or config.out.suffix != ".gguf":
        raise ValueError(f"{config.out}: --to gguf writes one file, whose name ends in .gguf")
    if _scores(config.model) or (config.adapter and models.is_scorer(config.adapter)):
        raise ValueError(
            "a reward model scores texts, which a gguf file has no place for; export it with --to hf"
        )
    if (
        config.adapter is None and config.dtype is None
    ):  # tensor by tensor, whatever the model's size
        name = Path(config.model).name
        gguf_write.write(config.out, open_checkpoint(config.model), kind, name=name)
        return
    model = common.load_model(config.model, dtype=config.dtype)
    models.save_gguf(config.out, model, _merged(config, model), kind)


def _merged(config: Config, model: Model) -> Any:
    if config.adapter is None:
        return model.params
    method, adapter = models.load_adapter(config.adapter, model, other_base=config.other_base)
    return method.merge(model.params, adapter)


def _peft(config: Config) -> None:
    if config.adapter is None:
        raise ValueError("--to peft writes an adapter: name it with --adapter")
    if models.is_scorer(config.adapter):
        model, method, params = common.load_scorer(
            config.model, adapter=config.adapter, other_base=config.other_base
        )
        models.save_scorer(config.out, model, method, params)
        return
    fields = files.read(config.adapter)[0].fields
    if "trainjax_method" in fields:
        raise ValueError(
            f"{config.adapter} is of {fields['trainjax_method']}, which the PEFT library does not have in "
            "this form; --to hf merges it into its model"
        )
    model = common.load_model(config.model)
    method, adapter = models.load_adapter(config.adapter, model, other_base=config.other_base)
    models.save_adapter(config.out, model, method, adapter)
    fields = files.read(config.out)[0].fields
    if not files.vllm_refuses(fields):
        common.say(
            f"vllm serve {config.model} --enable-lora --max-lora-rank {files.vllm_rank(fields)} "
            f"--lora-modules {config.out.name}={config.out}"
        )


def _merging(config: Config, adapter: Path) -> merge.Config:
    return merge.Config(
        model=config.model,
        adapter=adapter,
        out=config.out,
        dtype=config.dtype,
        other_base=config.other_base,
    )


def _scores(model: str) -> bool:
    """Whether it is a reward model's folder."""
    return SCORE in open_checkpoint(model).shapes()


TARGETS: Mapping[str, Callable[[Config], None]] = {"hf": _hf, "gguf": _gguf, "peft": _peft}
