"""The reference side of the benchmark: TRL + PEFT on the CPU, one JSON line of figures for each process.

Run from the repository's root, in an environment with torch, transformers, trl and peft, after `rows.py`:

    python experiments/benchmarks/reference_sft.py --mode default --dtype float32 --steps 6 \
        --rows runs/benchmarks/rows.jsonl --model /work/env/smol/model.gguf

Modes (LoRA of rank 16 and alpha 32 on all linear layers in the first three):
    default   SFTTrainer as TRL ships it: padded batches of 8 rows, max_length 512, completion-only loss
    packed    SFTTrainer with packing=True (best fit decreasing): 4 rows of 512, flattened by TRL to one row of 2048
    plain     a bare torch loop: dense 4 x 256 tokens, every token trained, no gradient checkpointing
    generate  greedy `generate`: 8 prompts of 64 tokens, 64 new tokens each; prefill included in the time

TRL's defaults stay (gradient checkpointing, AdamW, linear decay of the learning rate, clipping at 1.0) except where the
CPU or the benchmark needs it: `use_cpu`, no saving, no reports, `logging_steps=1`, rows in file order. `--dtype float32`
turns off TRL's default of bf16 autocast; `--dtype bfloat16` keeps it and loads the frozen weights as bf16 too (PEFT
keeps the adapter in fp32). Peak memory is `ru_maxrss` of the whole process, so measure one thing in a process.

Medians leave out the first step. One busy neighbour makes a step 3 to 7 times slower (OpenMP's threads wait for the one
that lost its core), so the line also has medians over the quiet steps, those in which others used less than 0.2 cores.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rows import pretrained, read_rows, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

SEED = 0
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
RECORDED = (
    "packing_strategy",
    "bf16",
    "optim",
    "lr_scheduler_type",
    "learning_rate",
    "max_grad_norm",
)


class StepClock(TrainerCallback):
    """Wall, own CPU and machine CPU seconds at the end of each step, so a step holds its batch, update and logging."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float]] = []

    def mark(self, *args: Any, **kwargs: Any) -> None:
        # /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal; all but idle and iowait are busy.
        ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        self.marks.append((time.perf_counter(), time.process_time(), busy))

    on_train_begin = on_step_end = mark

    def figures(self) -> dict[str, list[float]]:
        """Of each step: seconds, the cores that it used and the cores that other processes used meanwhile."""
        steps = [
            [end - begin for begin, end in zip(*pair)] for pair in zip(self.marks, self.marks[1:])
        ]
        return {
            "seconds": [wall for wall, _, _ in steps],
            "cores_used": [round(own / wall, 2) for wall, own, _ in steps],
            "cores_used_by_others": [round((busy - own) / wall, 2) for wall, own, busy in steps],
        }


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and the tokenizer of a .gguf file or a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(**pretrained(path), dtype=dtype)
    if path.suffix == ".gguf":
        # Its weights are plain tensors by now, but the Trainer refuses to train what is still marked as GGUF.
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(**pretrained(path))


def trl_sft(
    model: Any, tokenizer: Any, rows: list[dict], args: argparse.Namespace, clock: StepClock
) -> dict[str, Any]:
    """TRL's SFTTrainer, for the modes of `MODE_DEFAULTS`."""
    shape = dict(MODE_DEFAULTS[args.mode])
    if args.batch_size:
        shape["per_device_train_batch_size"] = args.batch_size
    if args.no_gradient_checkpointing:
        shape["gradient_checkpointing"] = False
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=args.dtype == "bfloat16",
        max_length=512,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        train_sampling_strategy="sequential",
        **shape,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LORA,
        callbacks=[clock],
    )
    batches = []
    collate = trainer.data_collator

    def counting(examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        # A packed batch has no attention mask, because TRL lays its rows end to end without padding.
        real = (
            batch["attention_mask"].sum().item()
            if "attention_mask" in batch
            else batch["input_ids"].numel()
        )
        batches.append((real, batch["input_ids"].numel(), (batch["labels"] != -100).sum().item()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    real, positions, trained = map(
        list, zip(*batches[: args.steps])
    )  # the loader reads one batch ahead
    return {
        "batch_size": config.per_device_train_batch_size,
        "max_length": config.max_length,
        "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "tokens": real,
        "positions_per_step": positions,
        "trained_tokens_per_step": trained,
        "rows_after_preparation": len(trainer.train_dataset),
        "gradient_checkpointing": model.is_gradient_checkpointing,  # asked of the model: what ran, not what was set
        "attention": model.config._attn_implementation,
        "trl": {name: str(getattr(config, name)) for name in RECORDED},
    }


def plain(
    model: Any, tokenizer: Any, rows: list[dict], args: argparse.Namespace, clock: StepClock
) -> dict[str, Any]:
    """PEFT in a bare torch loop over dense blocks of tokens: what the Trainer adds is not in this figure."""
    batch_size, length = args.batch_size or 4, 256
    set_seed(SEED)
    model = get_peft_model(model, LORA).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-5, weight_decay=0.0, fused=True)
    stream = torch.tensor([token for row in rows for token in token_ids(tokenizer, row)[1]])
    blocks = stream[: len(stream) // (batch_size * length) * batch_size * length].view(
        -1, batch_size, length
    )
    losses = []
    clock.mark()
    for block in islice(cycle(blocks), args.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(input_ids=block, labels=block, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.mark()
    return {
        "batch_size": batch_size,
        "max_length": length,
        "loss": losses,
        "tokens": [batch_size * length] * args.steps,
    }


def generate(
    model: Any, tokenizer: Any, rows: list[dict], args: argparse.Namespace, clock: StepClock
) -> dict[str, Any]:
    """Greedy decoding of the base model; `min_new_tokens` keeps every row going, so all runs make the same number."""
    batch_size, length, new = args.batch_size or 8, 64, 64
    whole = [token_ids(tokenizer, row)[1] for row in rows]
    prompts = torch.tensor([ids[:length] for ids in whole if len(ids) >= length])
    batches = prompts[: len(prompts) // batch_size * batch_size].view(-1, batch_size, length)
    clock.mark()
    for batch in islice(cycle(batches), args.steps):
        mask = torch.ones_like(batch)
        out = model.generate(
            batch, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
        assert out.shape == (batch_size, length + new), out.shape
        clock.mark()
    return {
        "batch_size": batch_size,
        "max_length": length + new,
        "loss": [],
        "tokens": [batch_size * new] * args.steps,
    }


MODES: dict[str, Callable[..., dict[str, Any]]] = {
    "default": trl_sft,
    "packed": trl_sft,
    "plain": plain,
    "generate": generate,
}


def peak_memory() -> int:
    """The process's largest resident set so far, in bytes (Linux counts `ru_maxrss` in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--rows", type=Path, required=True, help="the .jsonl file that rows.py wrote"
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="the first is not timed, so at least 2"
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="a .gguf file or a Hugging Face folder"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="instead of the mode's own, where a full step would take too long",
    )
    parser.add_argument(
        "--no-gradient-checkpointing",
        action="store_true",
        help="turn TRL's default off (TRL modes only)",
    )
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(
            f"--steps {args.steps} leaves nothing after the first step, which is not timed; use 2 or more"
        )

    torch.set_num_threads(os.cpu_count())
    clock = StepClock()
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # the Trainer prints its logs; stdout carries the JSON line alone
        model, tokenizer = load(args.model, getattr(torch, args.dtype))
        loaded = peak_memory()
        result = MODES[args.mode](model, tokenizer, read_rows(args.rows), args, clock)

    tokens, steps = result.pop("tokens"), clock.figures()
    timed = list(zip(tokens, steps["seconds"], steps["cores_used_by_others"]))[
        1:
    ]  # the first step allocates and warms up
    quiet = [(count, second) for count, second, others in timed if others < 0.2]
    figures = {
        "mode": args.mode,
        "dtype": args.dtype,
        "steps": args.steps,
        "seconds_per_step": statistics.median(second for _, second, _ in timed),
        "tokens_per_second": statistics.median(count / second for count, second, _ in timed),
        "quiet_steps": len(quiet),
        "quiet_seconds_per_step": statistics.median(second for _, second in quiet)
        if quiet
        else None,
        "quiet_tokens_per_second": statistics.median(count / second for count, second in quiet)
        if quiet
        else None,
        "tokens_are": "new" if args.mode == "generate" else "real",
        "tokens_per_step": tokens,
        "peak_memory_bytes": peak_memory(),
        "peak_memory_after_load_bytes": loaded,
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")
        },
    }
    print(json.dumps(figures | steps | result))


if __name__ == "__main__":
    main()
