"""The other side of a case: TRL + PEFT, or where TRL cannot be imported the same in a plain loop.

Both get rows of one text each, so that attention is torch's causal kernel and nothing is padded: packing
and padding-free batches would have nothing left to save. AdamW is the fused one, and what TRL's
SFTTrainer does by itself stays as it ships.
"""

from __future__ import annotations

import importlib.util
import resource
import tempfile
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_cases import (
    MODELS,
    PROMPT,
    Case,
    decode_bytes,
    dense,
    needed_flops,
    pair_lengths,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

LORA = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case."""
    if case.method == "generate":
        return generate(case)
    if case.method == "dpo":
        return preferences(case)
    if case.method == "qlora":
        raise ValueError("qlora has no other side here: it would need bitsandbytes")
    model = random_model(case)
    _forget_peak()
    has_trl = importlib.util.find_spec("trl") is not None
    parameters, seconds = (with_trl if has_trl else in_a_loop)(case, model)
    tokens = case.rows * case.length
    each = median(seconds[2:])
    return {
        "implementation": "TRL + PEFT" if has_trl else "transformers + PEFT, a plain loop",
        "attention": "sdpa",
        "tokens_per_step": tokens,
        "filled": 1.0,
        "seconds_per_step": each,
        "tokens_per_second": tokens / each,
        "flops_per_token": needed_flops(
            case,
            context=(case.length + 1) / 2,
            targets=1 - 1 / case.length,
            adapter_size=parameters if case.method == "lora" else 0,
        ),
        "peak_memory_bytes": _peak(),
        "compile_seconds": seconds[0] - each,
        "all_seconds": seconds,
    }


def random_model(case: Case) -> Any:
    """Frozen weights in bfloat16, weights that train in float32 under autocast, as TRL keeps them."""
    kind = torch.float32 if case.method == "full" else torch.bfloat16
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[case.model])
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")


def with_trl(case: Case, model: Any) -> tuple[int, list[float]]:
    """TRL's SFTTrainer on rows that are tokens already: trained numbers, and the seconds of each step."""
    from trl import SFTConfig, SFTTrainer

    rows = np.tile(dense(case), (3 + case.steps, 1)).tolist()  # the loader reads one batch ahead
    return _trained_by(SFTTrainer, SFTConfig, case, case.rows, model, {"input_ids": rows})


def preferences(case: Case) -> dict[str, Any]:
    """TRL's DPOTrainer on pairs of the lengths that ours have, in smaller batches: it pads them.

    Tokens count as ours do, a prompt once, and all seconds: steps differ by their longest pair.
    """
    from trl import DPOConfig, DPOTrainer

    model = random_model(case)
    _forget_peak()
    batch = 2 * case.rows
    lengths = (
        pair_lengths(case)[: batch * (3 + case.steps)] // 4
    )  # of a completion; a prompt has two
    words = [" ".join(WORDS[: n % len(WORDS)] + WORDS * (n // len(WORDS))) for n in lengths]
    data = {
        "prompt": [f"{text} {text} " for text in words],
        "chosen": words,
        "rejected": [f"<eos> {text}" for text in words],
    }
    parameters, seconds = _trained_by(DPOTrainer, DPOConfig, case, batch, model, data)
    each = sum(seconds[2:]) / case.steps
    tokens = 4 * float(lengths.mean()) * batch
    return {
        "implementation": "TRL + PEFT",
        "attention": "sdpa",
        "tokens_per_step": tokens,
        "pairs_per_step": batch,
        "seconds_per_step": each,
        "tokens_per_second": tokens / each,
        "flops_per_token": needed_flops(
            case,
            context=1.75 * float((lengths**2).sum() / lengths.sum()),
            targets=0.5,
            adapter_size=parameters,
            pairs=True,
        ),
        "peak_memory_bytes": _peak(),
        "compile_seconds": seconds[0] - each,
        "all_seconds": seconds,
    }


WORDS = [f"w{number}" for number in range(100)]


def _trained_by(
    trainer: Any, settings: Any, case: Case, batch: int, model: Any, columns: dict[str, Any]
) -> tuple[int, list[float]]:
    """Trained numbers, and the seconds of each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    class Clock(TrainerCallback):
        """When each step ended."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def mark(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            self.marks.append(time.perf_counter())

        on_train_begin = on_step_end = mark

    clock = Clock()
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )
    config = settings(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not ON_GPU,
        bf16=True,
        max_length=case.length,
        max_steps=2 + case.steps,
        per_device_train_batch_size=batch,
        gradient_checkpointing=case.remat == "full",
        torch_compile=case.compiled,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    running = trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=None if case.method == "full" else LORA,
        callbacks=[clock],
    )
    running.train()
    return _trained(running.model), np.diff(clock.marks).tolist()


def in_a_loop(case: Case, model: Any) -> tuple[int, list[float]]:
    """What SFTTrainer does for such rows: bf16 autocast, an adapter in float32, clipping, fused AdamW."""
    if case.method == "lora":
        model = get_peft_model(model, LORA)
    if case.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.method == "lora":
            model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if case.compiled else model
    rows = torch.from_numpy(dense(case)).to(DEVICE)
    seconds = []
    for _ in range(2 + case.steps):
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        seconds.append(time.perf_counter() - start)
    return _trained(model), seconds


def generate(case: Case) -> dict[str, Any]:
    """Greedy `generate` of transformers with its default cache, prefill included."""
    model = random_model(case).eval()
    _forget_peak()
    prompt = torch.arange(1, PROMPT + 1, device=DEVICE)[None].repeat(case.rows, 1)
    counts = {"min_new_tokens": case.length, "max_new_tokens": case.length}
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + case.steps // 2):
            start = time.perf_counter()
            ones = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=ones, do_sample=False, pad_token_id=0, **counts)
            _wait()
            seconds.append(time.perf_counter() - start)
    each = median(seconds[1:])
    return {
        "implementation": "transformers",
        "tokens_per_second": case.rows * case.length / each,
        "bytes_per_token": decode_bytes(case),
        "seconds_per_step": each,
        "peak_memory_bytes": _peak(),
        "compile_seconds": seconds[0] - each,
        "all_seconds": seconds,
    }


def _trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """What making the weights took is not training's."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
