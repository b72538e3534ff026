"""The trainjax side of the benchmark: what `trainjax sft` reports of itself, as one JSON line.

Run from the repository's root, after `rows.py` has made the rows:

    python experiments/benchmarks/trainjax_side.py --mode default --dtype float32 --steps 6 \
        --rows runs/benchmarks/rows.jsonl --model smollm2-135m-instruct

Modes, as on the reference's side (`reference_side.py`), LoRA of rank 16 and alpha 32 on all linear layers:
    default   batches of 8 rows of 512, filled best-fit (trainjax's own default)
    packed    batches of 4 rows of 512, filled best-fit
    plain     a dense 4 x 256, every token trained
    dpo       pairs that share their prompt's tokens: 2 rows of 512, filled best-fit with 8 to 9 pairs
    dpo-cached  the same, with the reference's log-probabilities computed before training
    generate  greedy, 8 prompts of 64 tokens, 64 new tokens each, prefill included

The training modes run the command that a user runs and read its `metrics.jsonl`: tokens are real ones,
memory is the peak resident set of the process. Medians leave out the first step, which compiles.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rows import read_rows

from trainjax import cli, data, models, rollout

SHAPES = {"default": (8, 512), "packed": (4, 512), "plain": (4, 256)}


def sft(args: argparse.Namespace) -> dict[str, Any]:
    """One run of `trainjax sft`."""
    batch_size, max_length = SHAPES[args.mode]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        data = (
            args.rows if args.mode != "plain" else long_texts(args.rows, Path(folder), max_length)
        )
        status = cli.main(
            [
                *("sft", "--model", args.model, "--data", str(data), "--out", str(out)),
                *("--steps", str(args.steps), "--batch-size", str(batch_size)),
                *("--max-length", str(max_length), "--accumulate", str(args.accumulate)),
                *("--peft.rank", "16", "--peft.alpha", "32", "--dtype", args.dtype),
                *("--remat", args.remat, "--packing", "best-fit"),
            ]
        )
        if status:
            sys.exit(status)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "accumulate": args.accumulate,
        "remat": args.remat,
        "first_step_seconds": records[0]["seconds"],
        "seconds_per_step": median(record["seconds"] for record in records[1:]),
        "tokens_per_second": median(record["tokens_per_second"] for record in records[1:]),
        "mfu": median(record["mfu"] for record in records[1:]),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "loss": [record["loss"] for record in records],
    }


def dpo(args: argparse.Namespace) -> dict[str, Any]:
    """One run of `trainjax dpo`; the tokens of a step are its pairs."""
    batch_size, max_length = 2, 512
    with tempfile.TemporaryDirectory() as folder:
        out, rows = Path(folder) / "run", Path(folder) / "pairs.jsonl"
        rows.write_text(args.rows.read_text())
        command = ["dpo", "--model", args.model, "--data", str(rows), "--out", str(out)]
        command += ["--steps", str(args.steps), "--batch-size", str(batch_size)]
        command += ["--max-length", str(max_length), "--accumulate", str(args.accumulate)]
        command += ["--peft.rank", "16", "--peft.alpha", "32", "--dtype", args.dtype]
        command += ["--remat", args.remat, "--packing", "best-fit"]
        command += ["--cache-reference"] if args.mode == "dpo-cached" else []
        if status := cli.main(command):
            sys.exit(status)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in records]
    pairs = pairs_of_batches(args, batch_size, max_length, len(records))
    return {
        "accumulate": args.accumulate,
        "remat": args.remat,
        "first_step_seconds": seconds[0],
        "seconds_per_step": median(seconds[1:]),
        "tokens_per_second": sum(pairs[1:]) / sum(seconds[1:]),
        "pairs_per_step": pairs,
        "real_tokens_per_second": median(record["tokens_per_second"] for record in records[1:]),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "loss": [record["loss"] for record in records],
    }


def pairs_of_batches(
    args: argparse.Namespace, batch_size: int, max_length: int, steps: int
) -> list[int]:
    """How many pairs each batch of the run held, from the plan that it followed."""
    tokenizer = models.load(args.model).tokenizer
    examples = data.encode_groups(data.read(args.rows), tokenizer, max_length)
    plan = data.Plan(batch_size, data.row_length(examples, max_length), data.best_fit, seed=0)
    epochs = (batch for epoch in itertools.count() for batch in plan.epoch(examples, epoch))
    return [sum(map(len, batch.rows)) for batch in itertools.islice(epochs, steps)]


def long_texts(rows: Path, folder: Path, length: int) -> Path:
    """Rows of plain text that are each longer than a batch's row, so that every slot is a token."""
    words = " ".join(row["prompt"][0]["content"] for row in read_rows(rows)).split()
    texts = [
        " ".join(words[start : start + length]) for start in range(0, len(words) - length, length)
    ]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding; no token ends an answer, so every row goes to its full length."""
    model = models.load(args.model, compute_dtype=args.dtype, dtype=args.dtype)
    tokenizer = model.tokenizer
    messages = [row["prompt"] + row["completion"] for row in read_rows(args.rows)]
    ids = [rollout.prompt_ids(tokenizer, conversation) for conversation in messages]
    tokenizer.eos_token = None
    model = dataclasses.replace(model, hf={})
    prompts = [row[:64] for row in ids if len(row) >= 64][:8]
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        answers = rollout.generate(model, prompts, max_new_tokens=64)
        seconds.append(time.perf_counter() - start)
        assert sum(len(answer.tokens) for answer in answers) == 8 * 64
    return {
        "first_step_seconds": seconds[0],
        "seconds_per_step": median(seconds[1:]),
        "tokens_per_second": 8 * 64 / median(seconds[1:]),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


OTHERS = {"generate": generate, "dpo": dpo, "dpo-cached": dpo}


def main() -> None:
    """Measures one mode and prints its line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=[*SHAPES, *OTHERS], required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=Path, required=True, help="the file that rows.py wrote")
    parser.add_argument("--steps", type=int, default=6, help="2 or more: the first is not timed")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", default="projections")
    args = parser.parse_args()
    measured = OTHERS.get(args.mode, sft)(args)
    print(json.dumps({"mode": args.mode, "dtype": args.dtype, "steps": args.steps} | measured))


if __name__ == "__main__":
    main()
