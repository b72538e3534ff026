"""The reference side of the benchmark: TRL + PEFT on the CPU, one JSON line of figures a process.

Run from the repository's root, in an environment with torch, transformers, trl and peft, after
`rows.py` has made the rows:

    python experiments/benchmarks/reference_side.py --mode default --dtype float32 --steps 6 \
        --rows runs/benchmarks/rows.jsonl --model path/to/model.gguf

Modes (LoRA of rank 16 and alpha 32 on all linear layers, but for generation):
    default   SFTTrainer as TRL ships it: padded batches of 8 rows of at most 512 tokens
    packed    SFTTrainer with packing=True: 4 rows of 512, which TRL lays end to end as 1 of 2048
    dpo       DPOTrainer as TRL ships it: 8 pairs of at most 512 tokens, the base as the reference
    plain     a bare torch loop: dense 4 x 256 tokens, all trained, no gradient checkpointing
    generate  greedy `generate`: 8 prompts of 64 tokens, 64 new tokens each, prefill included

TRL's defaults stay (completion-only loss, gradient checkpointing, AdamW, linear decay, clipping)
except where the CPU or the benchmark needs it: `use_cpu`, no saving, no reports, `logging_steps=1`,
rows in file order. float32 turns off TRL's default of bf16 autocast; bfloat16 keeps it and loads
the frozen weights as bf16 too (PEFT keeps the adapter in fp32).

Peak memory is `ru_maxrss` of the whole process, so measure one thing in a process. Medians leave
out the first step. One busy neighbour made steps up to 8 times slower (OpenMP's threads wait for
the one that lost its core), so there are also medians over the quiet steps, those in which other
processes used less than 0.2 cores. Pairs a second are all pairs over all seconds: the padding of a
batch of pairs is its longest one's, and steps differ by a factor of 6.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rows import pretrained, read_rows, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SEED = 0
VERSIONS = ["torch", "transformers", "trl", "peft", "accelerate"]
LORA = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
MODE_DEFAULTS = {
    "default": {"per_device_train_batch_size": 8},
    "packed": {"per_device_train_batch_size": 4, "packing": True},
}
RECORDED = ["packing_strategy", "bf16", "optim", "lr_scheduler_type", "learning_rate"]


class StepClock(TrainerCallback):
    """Wall, own CPU and the machine's CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float]] = []

    def mark(self, *args: Any, **kwargs: Any) -> None:
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        self.marks.append((time.perf_counter(), time.process_time(), busy))

    on_train_begin = on_step_end = mark

    def figures(self) -> dict[str, list[float]]:
        """Figures of each step: seconds, the cores that it used, those that other processes used."""
        spans = pairwise(self.marks)
        steps = [[end - begin for begin, end in zip(*span, strict=True)] for span in spans]
        return {
            "seconds": [wall for wall, _, _ in steps],
            "cores_used": [round(own / wall, 2) for wall, own, _ in steps],
            "cores_used_by_others": [round((busy - own) / wall, 2) for wall, own, busy in steps],
        }


class Job(NamedTuple):
    """What every mode is given."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    args: argparse.Namespace
    clock: StepClock


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer of a .gguf file or a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(**pretrained(path), dtype=dtype)
    if path.suffix == ".gguf":
        # The weights are plain tensors by now, but the Trainer refuses what is marked as GGUF.
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(**pretrained(path))


def trl_sft(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer, for the modes of `MODE_DEFAULTS`."""
    overrides = dict(MODE_DEFAULTS[job.args.mode])
    if job.args.batch_size:
        overrides["per_device_train_batch_size"] = job.args.batch_size
    if job.args.no_gradient_checkpointing:
        overrides["gradient_checkpointing"] = False
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=job.args.dtype == "bfloat16",
        max_length=512,
        max_steps=job.args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        train_sampling_strategy="sequential",
        **overrides,
    )
    trainer = SFTTrainer(
        model=job.model,
        args=config,
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        peft_config=LORA,
        callbacks=[job.clock],
    )
    batches = []
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        # A packed batch has no attention mask: it has no padding.
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        trained = batch["labels"] != -100
        batches.append((mask.sum().item(), mask.numel(), trained.sum().item()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    # The loader reads one batch ahead, hence the cut.
    real, positions, trained = map(list, zip(*batches[: job.args.steps], strict=True))
    return {
        "batch_size": config.per_device_train_batch_size,
        "max_length": config.max_length,
        "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "tokens": real,
        "positions_per_step": positions,
        "trained_tokens_per_step": trained,
        "rows_after_preparation": len(trainer.train_dataset),
        # Asked of the model: what ran, not what was set.
        "gradient_checkpointing": job.model.is_gradient_checkpointing,
        "attention": job.model.config._attn_implementation,
        "trl": {name: str(getattr(config, name)) for name in RECORDED},
    }


def trl_dpo(job: Job) -> dict[str, Any]:
    """TRL's DPOTrainer; the tokens of a step are its pairs."""
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=job.args.dtype == "bfloat16",
        per_device_train_batch_size=job.args.batch_size or 8,
        max_length=512,
        max_steps=job.args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        train_sampling_strategy="sequential",
        gradient_checkpointing=not job.args.no_gradient_checkpointing,
    )
    trainer = DPOTrainer(
        model=job.model,
        args=config,
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        peft_config=LORA,
        callbacks=[job.clock],
    )
    positions = []
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        positions.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()
    return {
        "batch_size": config.per_device_train_batch_size,
        "max_length": config.max_length,
        "beta": config.beta,
        "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "tokens": [config.per_device_train_batch_size] * job.args.steps,
        "positions_per_step": positions[: job.args.steps],
        "gradient_checkpointing": job.model.is_gradient_checkpointing,
        "trl": {name: str(getattr(config, name)) for name in RECORDED if hasattr(config, name)},
    }


def plain(job: Job) -> dict[str, Any]:
    """PEFT in a bare torch loop over dense blocks of tokens: without what the Trainer adds."""
    batch, length = job.args.batch_size or 4, 256
    set_seed(SEED)
    model = get_peft_model(job.model, LORA).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-5, weight_decay=0.0, fused=True)
    stream = torch.tensor([token for row in job.rows for token in token_ids(job.tokenizer, row)[1]])
    blocks = stream[: len(stream) // (batch * length) * batch * length].view(-1, batch, length)
    losses = []
    job.clock.mark()
    for block in islice(cycle(blocks), job.args.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=job.args.dtype == "bfloat16"):
            loss = model(input_ids=block, labels=block, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        job.clock.mark()
    tokens = [batch * length] * job.args.steps
    return {"batch_size": batch, "max_length": length, "loss": losses, "tokens": tokens}


def generate(job: Job) -> dict[str, Any]:
    """Greedy decoding of the base model; `min_new_tokens` keeps every row going to the end."""
    batch, length, new = job.args.batch_size or 8, 64, 64
    whole = [token_ids(job.tokenizer, row)[1] for row in job.rows]
    prompts = torch.tensor([ids[:length] for ids in whole if len(ids) >= length])
    blocks = prompts[: len(prompts) // batch * batch].view(-1, batch, length)
    counts = {"min_new_tokens": new, "max_new_tokens": new}
    job.clock.mark()
    for block in islice(cycle(blocks), job.args.steps):
        job.model.generate(block, attention_mask=torch.ones_like(block), do_sample=False, **counts)
        job.clock.mark()
    tokens = [batch * new] * job.args.steps
    return {"batch_size": batch, "max_length": length + new, "loss": [], "tokens": tokens}


MODES = {
    "default": trl_sft,
    "packed": trl_sft,
    "plain": plain,
    "generate": generate,
    "dpo": trl_dpo,
}
UNITS = {"generate": "new tokens", "dpo": "pairs"}


def peak_memory() -> int:
    """The process's largest resident set so far, in bytes (Linux counts `ru_maxrss` in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rate(mode: str, timed: list[tuple[int, float, float]]) -> float:
    """Tokens a second: the median of the steps, or of pairs, whose lengths differ most, over all steps."""
    if mode == "dpo":
        return sum(count for count, _, _ in timed) / sum(seconds for _, seconds, _ in timed)
    return median(count / second for count, second, _ in timed)


def main() -> None:
    """Measures one mode and prints its line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=Path, required=True, help="the file that rows.py wrote")
    parser.add_argument("--steps", type=int, default=6, help="2 or more: the first is not timed")
    parser.add_argument("--model", type=Path, required=True, help=".gguf or Hugging Face folder")
    parser.add_argument("--batch-size", type=int, help="instead of the mode's own")
    parser.add_argument("--no-gradient-checkpointing", action="store_true", help="TRL modes only")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps} leaves nothing after the first step; use 2 or more")

    torch.set_num_threads(os.cpu_count() or 1)
    clock = StepClock()
    # The Trainer prints its logs: stdout is to carry the JSON line alone.
    with contextlib.redirect_stdout(sys.stderr):
        model, tokenizer = load(args.model, getattr(torch, args.dtype))
        loaded = peak_memory()
        result = MODES[args.mode](Job(model, tokenizer, read_rows(args.rows), args, clock))

    tokens, steps = result.pop("tokens"), clock.figures()
    timed = list(zip(tokens, steps["seconds"], steps["cores_used_by_others"], strict=True))
    timed = timed if args.mode == "dpo" else timed[1:]
    quiet = [step for step in timed if step[2] < 0.2]
    figures = {
        "mode": args.mode,
        "dtype": args.dtype,
        "steps": args.steps,
        "seconds_per_step": median(second for _, second, _ in timed),
        "tokens_per_second": rate(args.mode, timed),
        "quiet_steps": len(quiet),
        "quiet_seconds_per_step": median(second for _, second, _ in quiet) if quiet else None,
        "quiet_tokens_per_second": median(n / second for n, second, _ in quiet) if quiet else None,
        "tokens_are": UNITS.get(args.mode, "real tokens"),
        "tokens_per_step": tokens,
        "peak_memory_bytes": peak_memory(),
        "peak_memory_after_load_bytes": loaded,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    print(json.dumps(figures | steps | result))


if __name__ == "__main__":
    main()
