"""Time and memory of DPO against a reward model with policy optimisation, at equal model and pairs.

    trainjax fetch smollm2-135m-instruct
    python experiments/dpo_against_rlhf_cost/run.py --out runs/dpo_against_rlhf_cost

Each part is a process of its own that runs the user's command (`trainjax dpo`, `trainjax reward`) on the
same pairs in the same packed rows, so that its peak resident set is its own. Prints a table in Markdown.
Reads ../shared/data/preferences.train.jsonl.gz.
"""

import argparse
import gzip
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainjax import data, models

DATA = Path(__file__).resolve().parents[3] / "shared/data/preferences.train.jsonl.gz"
MODEL = "smollm2-135m-instruct"
BATCH_SIZE, MAX_LENGTH = 2, 512
PARTS = {
    "DPO": ("dpo",),
    "DPO, reference cached": ("dpo", "--cache-reference"),
    "reward model": ("reward",),
}


def pairs(path: Path, count: int) -> None:
    """The first pairs of the training split as one-turn conversations."""
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    made = [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def pairs_of_batches(path: Path, steps: int) -> list[int]:
    """How many pairs each step trains on: the plan is the same for every part."""
    examples = data.encode_groups(data.read(path), models.load(MODEL).tokenizer, MAX_LENGTH)
    plan = data.Plan(BATCH_SIZE, data.row_length(examples, MAX_LENGTH), data.best_fit, seed=0)
    epochs = (batch for epoch in itertools.count() for batch in plan.epoch(examples, epoch))
    return [sum(map(len, batch.rows)) for batch in itertools.islice(epochs, steps)]


def run(part: str, rows: Path, out: Path, steps: int) -> list[dict[str, Any]]:
    """The records of a part's steps."""
    job, *flags = PARTS[part]
    folder = out / part.replace(", ", "_").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    command = ["trainjax", job, "--model", MODEL, "--data", rows, "--out", folder, "--steps", steps]
    command += ["--batch-size", BATCH_SIZE, "--max-length", MAX_LENGTH, "--packing", "best-fit"]
    command += ["--accumulate", 2, "--peft.rank", 16, "--peft.alpha", 32, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Runs every part and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/dpo_against_rlhf_cost"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=256)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the pairs are not at {DATA}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "pairs.jsonl"
    pairs(rows, args.pairs)
    counts = pairs_of_batches(rows, args.steps)
    print("| part | pairs/s | tokens/s | peak, GB |\n|---|---|---|---|")
    for part in PARTS:
        steps = run(part, rows, args.out, args.steps)[1:]  # the first one compiles
        seconds = sum(step["seconds"] for step in steps)
        tokens = steps[-1]["num_tokens"] - steps[0]["num_tokens"]
        speed = tokens / sum(step["seconds"] for step in steps[1:])
        peak = steps[-1]["peak_memory_bytes"] / 1e9
        print(
            f"| {part} | {sum(counts[1:]) / seconds:.2f} | {speed:.0f} | {peak:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
