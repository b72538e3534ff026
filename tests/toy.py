"""A toy that trains in a second: a byte-level tokenizer with ChatML, and a model folder for it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def tokenizer(template: str | None = CHATML, bos: bool = False) -> Any:
    """One token a byte after the three control tokens; end of sequence is also the padding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = template
    return made


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def model_folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a random model with the toy tokenizer as a Hugging Face folder."""
    from trainjax import models

    hf = CONFIG | changes
    model = models.random_model(hf, jax.random.key(seed), tokenizer=tokenizer())
    models.save_model(path, model)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Prompts and completions of several lengths."""
    return [
        {"prompt": f"say {'ab' * (i % 5)}{i}", "completion": f"{i} {'xyz' * (i % 4)}"}
        for i in range(count)
    ]


def trace(run: Path) -> list[dict[str, Any]]:
    """The records of a run's steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def exact(run: Path) -> list[list[float]]:
    """What of a run's trace does not depend on the machine's speed; floats as they were written."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy")
    return [[record[key] for key in keys] for record in trace(run)]
