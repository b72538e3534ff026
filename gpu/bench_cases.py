"""What the benchmark measures: architectures, cases in order of importance, the batches of all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def _llama(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return config | more


MODELS: dict[str, dict[str, Any]] = {
    "tiny": _llama(512, 64, 128, 2, 4, 2),
    "135m": _llama(49152, 576, 1536, 30, 9, 3),  # SmolLM2-135M
    "1b": _llama(  # Llama-3.2-1B
        *(128256, 2048, 8192, 16, 32, 8),
        rope_parameters=LLAMA3_ROPE | {"factor": 32.0},
        max_position_embeddings=131072,
    ),
    "8b": _llama(  # Llama-3.1-8B
        *(128256, 4096, 14336, 32, 32, 8),
        rope_parameters=LLAMA3_ROPE | {"factor": 8.0},
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ),
}
"""The `config.json` of each, weights drawn at random."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement, in a process of its own.

    Attributes:
        model: of `MODELS`.
        method: lora, qlora, full, dpo or generate.
        length: tokens of a row; of generation, new tokens.
        rows: of a batch.
        side: trainjax, or torch: TRL + PEFT where there is TRL, else a loop over transformers and PEFT.
        remat: what the backward pass keeps: projections, full (as gradient checkpointing), or none.
        compiled: with torch.compile.
        seconds: about as long as it takes; it is not begun with less left.
        steps: that are timed.
        profile: its costs are taken apart.
    """

    model: str
    method: str
    length: int
    rows: int
    side: str = "trainjax"
    remat: str = "projections"
    compiled: bool = False
    seconds: int = 40
    steps: int = 6
    profile: bool = False

    @property
    def name(self) -> str:
        """Such as 8b-lora-2x4096-torch-full."""
        parts = [self.model, self.method, f"{self.rows}x{self.length}", self.side, self.remat]
        return "-".join(parts + ["compiled"] * self.compiled)


def _torch(model: str, method: str, length: int, rows: int, remat: str, **more: Any) -> Case:
    return Case(model, method, length, rows, "torch", remat, **more)


GPU = [
    Case("8b", "lora", 4096, 2, seconds=75, profile=True),
    _torch("8b", "lora", 4096, 2, "none", seconds=50),
    Case("8b", "generate", 512, 1, remat="none", seconds=40),
    Case("8b", "lora", 4096, 2, remat="full", seconds=60),
    _torch("8b", "lora", 4096, 2, "full", seconds=50),
    _torch("8b", "lora", 4096, 1, "none", seconds=50),  # for 80 GB
    Case("8b", "qlora", 4096, 2, seconds=75),
    Case("1b", "dpo", 2048, 8),
    Case("1b", "full", 4096, 4),
    _torch("1b", "dpo", 2048, 8, "full"),
    Case("135m", "lora", 512, 64, seconds=30),
    Case("135m", "lora", 2048, 16, seconds=30),
    Case("135m", "lora", 8192, 4, seconds=30),
    _torch("1b", "full", 4096, 4, "none"),
    Case("1b", "lora", 4096, 4),
    Case("8b", "lora", 8192, 1, seconds=60),
    Case("8b", "lora", 512, 16, seconds=60),
    _torch("8b", "generate", 128, 1, "none"),
    Case("135m", "full", 2048, 16, seconds=30),
    Case("135m", "generate", 512, 1, remat="none", seconds=25),
    Case("8b", "dpo", 2048, 2, seconds=75),
    _torch("8b", "lora", 4096, 2, "none", compiled=True, seconds=110),
    Case("135m", "lora", 1024, 32, seconds=30),
    Case("135m", "lora", 4096, 8, seconds=30),
    Case("1b", "qlora", 4096, 4),
    Case("1b", "generate", 512, 1, remat="none", seconds=30),
]
"""For one GPU of 80 GB or more; the first ones are those that the aims are about."""

CPU = [
    Case("135m", "lora", 256, 2, seconds=60, steps=2, profile=True),
    *(
        Case("tiny", method, 512, 4, seconds=30, steps=2)
        for method in ("lora", "qlora", "full", "dpo")
    ),
    _torch("tiny", "lora", 512, 4, "none", seconds=30, steps=2),
    _torch("tiny", "dpo", 512, 4, "none", seconds=30, steps=2),
    Case("tiny", "generate", 64, 1, remat="none", seconds=30, steps=2),
    _torch("tiny", "generate", 64, 1, "none", seconds=30, steps=2),
    _torch("135m", "lora", 256, 2, "none", seconds=60, steps=2),
]
"""For where there is no GPU: that each path runs."""


def batch(case: Case) -> dict[str, np.ndarray]:
    """One batch of packed rows of random tokens, as the library's own pipeline fills it.

    Lengths are log-normal with a median of 300 tokens, or an eighth of a row. Of an example all tokens but
    the first are trained on; of a pair the completions are, and the prompt is there once for both.
    """
    from trainjax import data

    rng = np.random.default_rng(0)
    vocab = MODELS[case.model]["vocab_size"]
    examples = (_pairs if case.method == "dpo" else _texts)(rng, case, vocab)
    plan = data.Plan(case.rows, case.length)
    return data.fill(examples, plan, plan.epoch(examples, 0)[0])


def _lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Enough of them for many batches, so that rows are nearly full."""
    median = min(300, case.length // 8)
    count = 16 * case.rows * case.length // median
    return np.clip(rng.lognormal(np.log(median), 0.8, count).astype(int), 16, case.length)


def _texts(rng: np.random.Generator, case: Case, vocab: int) -> Any:
    from trainjax import data

    lengths = _lengths(rng, case)
    offsets = np.cumsum([0, *lengths])
    trained = np.ones(offsets[-1], bool)
    trained[offsets[:-1]] = False
    tokens = rng.integers(vocab, size=offsets[-1], dtype=np.int32)
    return data.Examples(tokens, trained, offsets, np.arange(len(lengths)))


def _pairs(rng: np.random.Generator, case: Case, vocab: int) -> Any:
    """Half of a pair is its prompt, a quarter each completion, which the prompt's last token begins."""
    from trainjax import data
    from trainjax.data.encode import Groups

    lengths = pair_lengths(case)
    offsets = np.cumsum([0, *lengths])
    branches = np.concatenate([np.repeat([0, 0, 1, 2], n // 4) for n in lengths]).astype(np.int32)
    targets = (branches > 0) & (np.diff(branches, prepend=0) == 0)
    tokens = rng.integers(vocab, size=offsets[-1], dtype=np.int32)
    groups = Groups(2, branches, targets, {})
    best = targets & (branches == 1)
    return data.Examples(tokens, best, offsets, np.arange(len(lengths)), groups=groups)


def pair_lengths(case: Case) -> np.ndarray:
    """Tokens of each pair, whose prompt is there once."""
    return _lengths(np.random.default_rng(0), case) // 4 * 4


def dense(case: Case) -> np.ndarray:
    """The rows of the other side: as many tokens, one text a row, so that plain causal attention serves."""
    vocab = MODELS[case.model]["vocab_size"]
    return np.random.default_rng(0).integers(vocab, size=(case.rows, case.length), dtype=np.int64)


def needed_flops(
    case: Case, *, context: float, targets: float, adapter_size: int, pairs: bool = False
) -> float:
    """FLOPs that a step needs for each real token: `nn.flops`, and of pairs the reference's forward pass."""
    from trainjax.models import llama
    from trainjax.nn.flops import flops_per_token

    config = llama.config(MODELS[case.model])
    full = case.method == "full"

    def flops(context: float, adapter_size: int) -> float:
        return flops_per_token(
            config, context=context, adapter_size=adapter_size, full=full, targets=targets
        )

    total = flops(context, adapter_size)
    if pairs:  # half of what frozen weights take, a third of what attention does
        total += flops(0.0, 0) / 2 + (flops(context, 0) - flops(0.0, 0)) / 3
    return total


def decode_bytes(case: Case, bytes_per_number: int = 2) -> float:
    """Bytes that a token of batch 1 needs: all weights but the table of embeddings, and the cache's mean.

    Tied embeddings are the head and are read.
    """
    c = MODELS[case.model]
    heads = c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"] + 2)
    weights = c["num_hidden_layers"] * layer + c["hidden_size"] * (c["vocab_size"] + 1)
    place = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    return bytes_per_number * (weights + place * (PROMPT + case.length / 2))


PROMPT = 64
"""Tokens of a prompt in generation."""
