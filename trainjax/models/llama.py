"""The Llama family: Llama 2 and 3, SmolLM2 and whatever else calls its model_type `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainjax.nn import DecoderConfig
from trainjax.ops.rope import Rope

TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/output/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/query/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/key/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/value/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/output/bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers/mlp/up/bias": "model.layers.{}.mlp.up_proj.bias",
    "layers/mlp/down/bias": "model.layers.{}.mlp.down_proj.bias",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
"""Our names to those of transformers; `{}` is the layer. Kernels are transposed."""


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The architecture that a `config.json` describes.

    Raises:
        ValueError: a setting that changes the function and is not supported.
    """
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported; silu is")
    heads = hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope=rope(hf),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_length=hf.get("max_position_embeddings", 2048),
    )


def rope(hf: Mapping[str, Any]) -> Rope:
    """Rotary settings, as transformers 5 writes them (`rope_parameters`) or earlier versions did.

    Raises:
        ValueError: a kind of scaling that is not supported.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0
    if scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, scaling["factor"])
    if kind == "llama3":
        return Rope(
            theta,
            scaling["factor"],
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        )
    raise ValueError(f"rope_type={kind!r} is not supported; default, linear and llama3 are")
