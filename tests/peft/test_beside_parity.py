"""PEFT's adapters of the embedding, the head, whole modules and rows of tokens: one function, both ways."""

import pytest

from tests.peft import library

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: of tied weights, which they leave as they are
]

TIED, UNTIED = "llama_tied", "llama_grouped"
SETTINGS = {
    "embedding and head": (UNTIED, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embedding": (TIED, {"target_modules": ["up_proj", "embed_tokens"]}),
    "tied head": (TIED, {"target_modules": ["v_proj", "lm_head"], "use_rslora": True}),
    "copies": (UNTIED, {"modules_to_save": ["norm", "lm_head"]}),
    "tied copies": (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied copy": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "rows": (UNTIED, {"trainable_token_indices": [3, 5, 40]}),
    "tied rows": (TIED, {"trainable_token_indices": [3, 5, 40]}),
    "rows of each": (
        TIED,
        {"trainable_token_indices": {"embed_tokens": [3, 40], "lm_head": [5, 6, 7]}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_same_function_here_merged_and_back_there(tmp_path, name):
    import peft

    family, settings = SETTINGS[name]
    common = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": ["v_proj"]}
    config = peft.LoraConfig(**common | settings)
    library.assert_same_both_ways(tmp_path, config, family)
