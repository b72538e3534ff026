"""A base in 4 bits against one in 16 and against training everything in 32: loss and memory.

    trainjax fetch smollm2-135m-instruct
    python experiments/qlora/run.py --out runs/qlora

Reads ../shared/data/instructions.{train,test}.jsonl.gz. Each line is the job `trainjax sft` in a process of
its own, on the same rows in the same order; its peak resident memory is taken beside that of a process
that has read the data and built nothing. Skips lines that are done, so an interrupted run goes on; writes
OUT/table.md and OUT/qlora.png.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DATA = Path(__file__).resolve().parents[3] / "shared/data"
MODEL = "smollm2-135m-instruct"
LINES: dict[str, list[str]] = {
    "all weights, float32": ["--full", "--dtype", "float32", "--learning-rate", "5e-5"],
    "LoRA, float32": ["--dtype", "float32", "--learning-rate", "5e-4"],
    "LoRA, bfloat16": ["--dtype", "bfloat16", "--learning-rate", "5e-4"],
    "LoRA, NF4": ["--dtype", "bfloat16", "--base-format", "nf4", "--learning-rate", "5e-4"],
}


def held_out(path: Path, count: int) -> None:
    """Every so-and-so-manyth row of the test split, so that all tasks are in it."""
    with gzip.open(DATA / "instructions.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = lines.read().splitlines()
    path.write_text("\n".join(rows[:: len(rows) // count][:count]) + "\n", encoding="utf-8")


def train(name: str, folder: Path, args: argparse.Namespace) -> None:
    """A line's run; leaves its peak memory and time in the folder."""
    command = [sys.executable, "-m", "trainjax.cli", "sft", "--model", MODEL, "--out", str(folder)]
    command += ["--data", str(DATA / "instructions.train.jsonl.gz"), "--remat", "full"]
    command += ["--eval-data", str(args.out / "test.jsonl"), "--eval-every", str(args.steps // 4)]
    command += ["--steps", str(args.steps), "--batch-size", "2", "--accumulate", "2"]
    command += ["--max-length", "512", "--seed", str(args.seed), *LINES[name]]
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    found = {"peak": usage.ru_maxrss / 2**20, "seconds": time.perf_counter() - start}
    (folder / "usage.json").write_text(json.dumps(found))


def idle(args: argparse.Namespace) -> float:
    """Peak memory in GB of a process that reads the rows and starts JAX, and holds no model."""
    program = (
        "import jax, trainjax as tj\n"
        "from trainjax.recipes import sft\n"
        f"rows = tj.data.read({str(DATA / 'instructions.train.jsonl.gz')!r})\n"
        "jax.numpy.ones(3).sum().block_until_ready()\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(out.stdout.split()[-1]) / 2**20


def result(folder: Path) -> dict[str, Any]:
    """What a finished run has left."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    trained = [r for r in records if "loss" in r]
    rate = sorted(r["tokens_per_second"] for r in trained)[len(trained) // 2]
    return json.loads((folder / "usage.json").read_text()) | {"evals": evals, "rate": rate}


def main() -> None:
    """Runs every line that is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/qlora"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the rows are not at {DATA}")
    args.out.mkdir(parents=True, exist_ok=True)
    held_out(args.out / "test.jsonl", args.held_out)
    empty = idle(args)
    table = f"| line | held-out loss | peak, GB | beyond an idle process ({empty:.2f} GB) | tokens/s |\n"
    table += "|---|---|---|---|---|\n"
    figure = Figure((6.0, 3.6), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name in LINES:
        folder = args.out / name.replace(", ", "-").replace(" ", "-").lower()
        if not (folder / "usage.json").exists():
            train(name, folder, args)
        found = result(folder)
        cells = [name, f"{found['evals'][-1][1]:.4f}", f"{found['peak']:.2f}"]
        cells += [f"{found['peak'] - empty:.2f}", f"{found['rate']:.0f}"]
        table += f"| {' | '.join(cells)} |\n"
        axes.plot(*zip(*found["evals"], strict=True), "o-", label=name)
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(args.out / "qlora.png")
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
