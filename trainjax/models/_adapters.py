"""Adapters on disk, in the format of the PEFT library: what is trained here loads there, and back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainjax import tree
from trainjax.io import peft as files
from trainjax.io.hub import public_name
from trainjax.models._model import SCORE, Model, family, tensor_names
from trainjax.models._save import host_array, save_model, whole
from trainjax.peft._methods import method_of
from trainjax.types import Params, Peft, PeftFiles

_SCORING = "SEQ_CLS"  # PEFT's word for it
_SCORE = SCORE.removesuffix(".weight")


def save_adapter(path: str | Path, model: Model, method: Peft, adapter: Params) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads.

    The base's fingerprint goes with it, so that loading it over another base is noticed. A warning is
    logged where vLLM would refuse the adapter.

    Args:
        path: the folder; one of an earlier adapter is replaced.
        model: the base that it was trained on.
        method: `peft.lora(...)` and the like.
        adapter: the trained arrays.
    """
    adapter = jax.tree.map(whole, adapter)
    exported = method.export(adapter, peft_modules(model.hf, model.params))
    base = {"task_type": "CAUSAL_LM", "base_model_name_or_path": public_name(model.source)}
    fields = base | exported.fields
    if reasons := files.vllm_refuses(fields):
        logging.getLogger(__name__).warning("vLLM would not serve the adapter: %s", reasons)
    files.write(Path(path), exported._replace(fields=fields), model.fingerprint)


def load_adapter(
    path: str | Path, model: Model, *, other_base: bool = False
) -> tuple[Peft, Params]:
    """The method and the arrays of an adapter in PEFT's format.

    Args:
        path: its folder.
        model: the base that it goes on.
        other_base: accept an adapter that was trained here on another base of the same shape.

    Raises:
        ValueError: not an adapter, a kind or a setting that is not supported, tensors that do not
            fit, or trained on another base.
    """
    found = _read(path, model, other_base=other_base)
    if found.fields.get("task_type") == _SCORING:
        raise ValueError(
            f"{path} is the adapter of a reward model, which scores texts and makes none; read it with "
            "load_scorer, or give the adapter of a model that generates"
        )
    return _from_files(path, found, model)


def save_scorer(path: str | Path, model: Model, method: Peft | None, params: Params) -> None:
    """Writes a reward model for transformers or PEFT, and for `load_scorer`.

    Without a method a folder that `AutoModelForSequenceClassification.from_pretrained` reads. With one
    an adapter's folder of `task_type` SEQ_CLS, the head in it, which PEFT loads over that class and the
    base. In both, transformers scores the last token that is not padding, as `scorer` does: of rows that
    it tokenizes itself, by the chat template too, a text ends where it did in training. Where the base's
    config names no `pad_token_id`, which transformers needs for batches, one that ends no text is to be
    named with an adapter; a whole model's folder has it.

    Args:
        path: the folder; see `save_model` and `save_adapter`.
        model: the base.
        method: the adapter's functions, or None where every weight trained.
        params: of the scorer, `{"body": ..., "score": ...}`.

    Raises:
        ValueError: as `save_model`.
    """
    if method is None:
        save_model(path, model, {**params["body"], "score": params["score"]})
        return
    body = jax.tree.map(whole, params["body"])
    exported = method.export(body, peft_modules(model.hf, model.params))
    base = {"task_type": _SCORING, "base_model_name_or_path": public_name(model.source)}
    copied = exported.fields.get("modules_to_save") or []
    fields = base | exported.fields | {"modules_to_save": [*copied, _SCORE]}
    kernel = host_array(params["score"]["kernel"])
    tensors = {**exported.tensors, SCORE: np.ascontiguousarray(kernel.T)}
    files.write(Path(path), PeftFiles(fields, tensors), model.fingerprint)


def is_scorer(path: str | Path) -> bool:
    """Whether an adapter is a reward model's, with a head that scores.

    Raises:
        ValueError: not an adapter's folder, or one whose files are damaged.
    """
    return SCORE in files.read(Path(path))[0].tensors


def load_scoring_adapter(
    path: str | Path, model: Model, *, other_base: bool = False
) -> tuple[Peft, Params]:
    """The method and the params, head included, of a reward model's adapter.

    Raises:
        ValueError: as `load_adapter`; an adapter without a head that scores.
    """
    found = _read(path, model, other_base=other_base)
    fields, tensors = dict(found.fields), dict(found.tensors)
    saved = fields.pop("modules_to_save", None) or []
    if SCORE not in tensors:
        raise ValueError(
            f"{path} is an adapter of task_type={fields.get('task_type')!r} without {SCORE}, so it cannot "
            f"score; a reward model's has task_type={_SCORING!r} and the weights of its head"
        )
    if others := set(saved) - {_SCORE, "classifier"}:  # PEFT names both, whichever the model has
        fields["modules_to_save"] = sorted(others)
    kernel = jnp.asarray(tensors.pop(SCORE).T, jnp.float32)
    method, adapter = _from_files(path, PeftFiles(fields, tensors), model)
    return method, {"body": adapter, "score": {"kernel": kernel}}


def _read(path: str | Path, model: Model, *, other_base: bool) -> PeftFiles:
    """An adapter's files, if they are of this base."""
    found, fingerprint = files.read(Path(path))
    if fingerprint not in (None, model.fingerprint) and not other_base:
        raise ValueError(
            f"{path} was trained on another base (fingerprint {fingerprint}; {model.source} has "
            f"{model.fingerprint}); load that base, or say that another is meant: other_base"
        )
    return found


def _from_files(path: str | Path, found: PeftFiles, model: Model) -> tuple[Peft, Params]:
    modules = peft_modules(model.hf, model.params)
    tensors = dict(found.tensors)
    for name in ("embed/embedding", "head/kernel"):
        _drop_copies(modules[name], found.fields, tensors, functools.partial(_ends, model, name))
    found = found._replace(tensors=tensors)
    if (loaded := method_of(found, modules, model.params)) is not None:
        return loaded
    raise ValueError(
        f"{path}: adapters of peft_type={found.fields.get('peft_type')!r} are not supported"
    )


def _drop_copies(
    module: str,
    fields: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    base: Callable[[], np.ndarray],
) -> None:
    """Takes away the copies of the base's own weights that PEFT adds beside an embedding's adapter.

    Raises:
        ValueError: they are not this base's.
    """
    is_listed = any(module.endswith(end) for end in fields.get("modules_to_save") or ())
    for kind in ("base_layer.weight", *(() if is_listed else ("weight",))):
        if (copied := tensors.pop(f"{module}.{kind}", None)) is None:
            continue
        own = base()
        is_equal = copied.shape == own.shape and np.allclose(
            np.asarray(copied, np.float32), own, rtol=2**-7, atol=1e-5
        )
        if not is_equal:
            raise ValueError(
                f"the adapter holds {module}.{kind} {copied.shape} of the base that it was trained on, and "
                f"this one's is another {own.shape}: tokens were added to it, or its weights had changed; "
                "save that base as a folder, and give it"
            )


def _ends(model: Model, name: str) -> np.ndarray:
    """The embedding or the head as the checkpoint has it, in float32."""
    leaves = tree.flatten(model.params)
    leaf = leaves.get(name, leaves["embed/embedding"])
    value = host_array(leaf).astype(np.float32)
    return value.T if name in leaves and name.endswith("kernel") else value


def peft_modules(hf: Mapping[str, Any], params: Params) -> dict[str, str]:
    """PEFT's module for each of our leaves, by full name, layer number included.

    The head is among them where it is the embedding too, which an adapter may part.
    """
    modules = {"head/kernel": family(hf).TENSORS["head/kernel"].removesuffix(".weight")}
    for name, tensors in tensor_names(hf, params).items():
        for layer, tensor in enumerate(tensors):
            full = tree.numbered(name, (layer,) if name.startswith("layers/") else ())
            modules[full] = tensor.rpartition(".")[0]
    return modules
