"""Tiny models of transformers and adapters of PEFT, for live comparisons and `golden/make_llama.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # of the two frequencies one stays, one is interpolated
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_grouped": ("Llama", {"num_key_value_heads": 2}),
    "llama_one_kv_head": ("Llama", {"num_key_value_heads": 1, "rope_parameters": _LINEAR}),
    "llama_biased_llama3": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _LLAMA3,
        },
    ),
    "llama_tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_wide_heads": ("Llama", {"num_key_value_heads": 2, "head_dim": 6}),
    "mistral_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
"""Models by name: the class in transformers, and its settings besides the sizes."""

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_linear": ("llama_grouped", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "patterns": (
        "llama_biased_llama3",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
            "alpha_pattern": {"o_proj": 3, r"layers\.0\.mlp\.up_proj": 10},
        },
    ),
    "one_layer": (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"q_proj": 2},
        },
    ),
}
"""Adapters by name: the model, and the settings of PEFT's `LoraConfig`."""


def torch_model(name: str) -> Any:
    """The model of transformers, every parameter drawn at random."""
    import transformers

    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return torch_randomised(model, seed=name)


def torch_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """PEFT's wrapper of the model, both factors drawn at random."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    return torch_randomised(peft.get_peft_model(model, config).eval(), only="lora_")


def torch_randomised(model: Any, only: str = "", seed: str = "") -> Any:
    """Parameters drawn from their names and the seed, norms around 1."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                rng = np.random.default_rng([*f"{seed}/{name}".encode()])
                noise = 0.3 * rng.standard_normal(parameter.shape)
                parameter.copy_(torch.from_numpy(noise + 1.0 if "norm" in name else noise))
    return model


METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama_grouped", "LoraConfig", {"r": 3, "lora_alpha": 6, "target_modules": ALL}),
    "rslora": (
        "llama_biased_llama3",
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    ),
    "dora": (
        "llama_biased_llama3",
        "LoraConfig",
        {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ALL},
    ),
    "ia3": (
        "llama_biased_llama3",
        "IA3Config",
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "vera": (
        "llama_grouped",
        "VeraConfig",
        {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "d_initial": 0.1},
    ),
    "adalora": (
        "llama_grouped",
        "AdaLoraConfig",
        {"target_r": 2, "init_r": 4, "lora_alpha": 6, "total_step": 20, "target_modules": ALL},
    ),
    "prompt": ("llama_grouped", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix": ("llama_grouped", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix_without_groups": (
        "llama_biased_llama3",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 2},
    ),
}
"""Methods by name: the model, the class of PEFT's configuration, and its settings."""

STEPS, LEARNING_RATE = 20, 1e-2
"""Of the training that `golden/make_peft.py` records."""
