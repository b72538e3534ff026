"""The architectures of llama.cpp in the terms of `transformers`: config, names, order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainjax.io.gguf_header import Tensor


class Architecture(NamedTuple):
    """How a `general.architecture` of llama.cpp is said in the terms of `transformers`.

    Attributes:
        config: `(metadata, tensors, read) -> config.json`, all by the file's own names.
        names: the modules' names here and there, `{}` for the layer; None drops the tensor.
        rows: `(Hugging Face name, number of rows, config) -> order`: the rows in the order of
            `transformers`, or None where they are in that order.
    """

    config: Callable[[Mapping[str, Any], Mapping[str, Tensor], Callable], dict[str, Any]]
    names: Mapping[str, str | None]
    rows: Callable[[str, int, Mapping[str, Any]], np.ndarray | None]


def architecture(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture of a file, by its metadata.

    Raises:
        ValueError: one that is not known.
    """
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(f"its general.architecture is {name!r}; the supported are: {supported}")
    return _ARCHITECTURES[name]


def by_hf_name(tensors: Mapping[str, Tensor], names: Mapping[str, str | None]) -> dict[str, Tensor]:
    """A file's tensors by the names of `transformers`, without those that these do not have."""
    renamed = {_hf_name(name, names): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def _hf_name(name: str, names: Mapping[str, str | None]) -> str | None:
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    known = f"blk.{{}}.{module[layer.end() :]}" if layer else module
    if known not in names or kind not in ("weight", "bias"):
        raise ValueError(f"its tensor {name!r} has no counterpart in the model of transformers")
    target = names[known]
    return target and f"{target.format(*layer.groups() if layer else ())}.{kind}"


def _config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    kind = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ValueError(f"its metadata lacks {kind}.{key}")
        if isinstance(value, list) and len(set(value)) != 1:
            raise ValueError(
                f"{kind}.{key}={value} differs by layer; one value for all is supported"
            )
        return value[0] if isinstance(value, list) else value

    if get("expert_count", 0):
        raise ValueError(
            f"{kind}.expert_count={get('expert_count')}; only dense models are supported"
        )
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{kind}.{key}={get(key)} is not the width of a head, {head_dim}")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no tensor token_embd.weight")
    theta = _decimal(get("rope.freq_base", 10000.0))
    factors = read("rope_freqs.weight") if "rope_freqs.weight" in tensors else None
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(kind, metadata, factors, theta),
        "max_position_embeddings": get("context_length"),
        # Not llama.vocab_size, which need not count the rows that pad the embedding.
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(re.search(r"\.attn_\w+\.bias$", name) for name in tensors),
        "mlp_bias": any(re.search(r"\.ffn_\w+\.bias$", name) for name in tensors),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    architecture: str, metadata: Mapping[str, Any], factors: np.ndarray | None, theta: float
) -> dict[str, Any] | None:
    # As in llama.cpp: a factor without a type is linear, and 0 or 1 is none.
    prefix = f"{architecture}.rope"
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    legacy = metadata.get(f"{prefix}.scale_linear", 1.0)
    factor = _decimal(metadata.get(f"{prefix}.scaling.factor", legacy))
    if kind not in ("none", "linear"):
        raise ValueError(f"{prefix}.scaling.type={kind!r} is not supported; none and linear are")
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if factors is None or np.all(factors == 1):
        return {"rope_type": "linear", "factor": factor} if linear else None
    if linear:
        raise ValueError(
            "it scales its rotary frequencies twice, by rope_freqs.weight and linearly"
        )
    return _llama3_scaling(factors.astype(np.float64), theta)


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The `rope_scaling` that divides the rotary frequencies by `factors`, shape `[head_dim / 2]`.

    The converter of llama.cpp keeps of Llama 3's four numbers only what they do to the wavelength
    `w = 2π·theta^(2i/head_dim)` of each frequency: `llama3_factors`. From these:

    - `factor` is the largest;
    - where a factor lies between 1 and `factor`, `smooth` follows from it, and it is a line in 1/w
      with slope `L / (high - low)` and intercept `-low / (high - low)`.

    Two equations for the three numbers L, low and high: they count only by their ratios, so low = 1
    is no loss. Fewer than two factors in between leave the line open; then the numbers of every
    published Llama 3 are tried. The result is checked against all factors.
    """
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    guesses = [(4.0, 8192)]
    between = (factors > 1) & (factors < factor)
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(1 / wavelengths[between], smooth, 1)
        if intercept < 0 < slope:
            guesses.append((round(1 - 1 / float(intercept), 3), round(-slope / intercept)))
    for high, length in guesses:
        # The file holds float32 computed in float32.
        if np.allclose(
            factors, llama3_factors(wavelengths, factor, high, float(length)), rtol=1e-5
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise ValueError("its rope_freqs.weight is not the scaling of Llama 3, the only one supported")


def llama3_factors(
    wavelengths: np.ndarray, factor: float, high: float, length: float
) -> np.ndarray:
    """1 below the wavelength `length / high`, `factor` above `length`, smooth between the two."""
    smooth = np.clip((length / wavelengths - 1) / (high - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def llama_rows(name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
    """The order that undoes llama.cpp's, for the rows of the queries and keys.

    llama.cpp rotates neighbours (0, 1), (2, 3), ... of a head, transformers halves (0, d/2), ...
    """
    module = name.split(".")[-2]
    if module not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads" if module == "q_proj" else "num_key_value_heads"]
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": None,  # said by config["rope_scaling"]
}

_ARCHITECTURES = {
    # Llama 2 and 3, SmolLM, Mistral.
    "llama": Architecture(config=_config, names=LLAMA_NAMES, rows=llama_rows),
    # Qwen2 and Qwen2.5, whose halves llama.cpp rotates as transformers does.
    "qwen2": Architecture(config=_config, names=LLAMA_NAMES, rows=lambda *_: None),
}
