"""trainjax beside TRL + PEFT and plain torch on this machine, on the same rows: ratios.

    pip install -e '.[parity]' && trainjax fetch smollm2-135m-instruct
    python experiments/benchmarks/compare.py --out runs/benchmarks

Every measurement is a process of its own, so that its peak resident set is its own; the two sides of a
line follow each other, and with `--repeats` they alternate. Prints a table in Markdown and writes
every figure to OUT/results.jsonl. Leave the machine alone meanwhile: absolute figures move with its
load, ratios less so.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rows import benchmark_rows, preference_rows

from trainjax.io.fetch import fetched

HERE = Path(__file__).parent

# (line, mode, dtype, our micro-batches, steps there, steps here)
LINES = [
    ("SFT, batch 8, TRL's default", "default", "float32", 8, 3, 6),
    ("SFT, batch 8, TRL's default", "default", "bfloat16", 8, 3, 4),
    ("SFT, packed 4 x 512", "packed", "float32", 4, 3, 6),
    ("SFT, packed 4 x 512", "packed", "bfloat16", 4, 3, 4),
    ("SFT, dense 4 x 256, plain torch", "plain", "float32", 4, 5, 8),
    ("generation, 8 x (64 + 64)", "generate", "float32", 1, 4, 5),
    ("generation, 8 x (64 + 64)", "generate", "bfloat16", 1, 3, 3),
    ("DPO, 8 pairs, pairs/s", "dpo", "float32", 2, 6, 9),
    ("DPO, 8 pairs, reference cached", "dpo-cached", "float32", 2, 6, 9),
    ("DPO, 8 pairs, pairs/s", "dpo", "bfloat16", 2, 6, 9),
]


def measure(script: str, *args: object) -> dict[str, Any]:
    """The JSON line that a side prints last."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def sides(
    rows: Path, pairs: Path, model: Path, only: list[str], repeats: int
) -> Iterator[dict[str, Any]]:
    """Each line with what both sides measured."""
    for name, mode, dtype, accumulate, steps_there, steps_here in LINES:
        if only and f"{mode}-{dtype}" not in only:
            continue
        common = ("--dtype", dtype, "--rows", pairs if mode.startswith("dpo") else rows)
        theirs, ours = [], []
        for _ in range(repeats):
            mode_there = mode.removesuffix("-cached")
            settings = ("--mode", mode_there, "--model", model, "--steps", steps_there)
            theirs.append(measure("reference_side.py", *common, *settings))
            settings = ("--mode", mode, "--steps", steps_here, "--accumulate", accumulate)
            ours.append(measure("trainjax_side.py", *common, *settings))
        yield {"line": name, "dtype": dtype, "reference": theirs, "trainjax": ours}


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    speed, memory = (
        {side: median(run[key] for run in result[side]) for side in ("reference", "trainjax")}
        for key in ("tokens_per_second", "peak_memory_bytes")
    )
    cells = [
        result["line"],
        result["dtype"],
        f"{speed['reference']:.3g}",
        f"{speed['trainjax']:.3g}",
        f"**{speed['trainjax'] / speed['reference']:.2f}**",
        f"{memory['reference'] / 1e9:.2f}",
        f"{memory['trainjax'] / 1e9:.2f}",
        f"**1/{memory['reference'] / memory['trainjax']:.1f}**",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures every line, and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="lines such as default-float32")
    args = parser.parse_args()
    folder = fetched("smollm2-135m-instruct")
    if folder is None:
        sys.exit("first: trainjax fetch smollm2-135m-instruct")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, pairs = args.out / "rows.jsonl", args.out / "pairs.jsonl"
    for path, made in ((rows, benchmark_rows()), (pairs, preference_rows(count=256))):
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    print(
        "| what | dtype | reference, tokens/s | trainjax | ratio | reference, GB | trainjax | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with (args.out / "results.jsonl").open("w") as results:
        for result in sides(rows, pairs, next(folder.glob("*.gguf")), args.only, args.repeats):
            print(json.dumps(result), file=results, flush=True)
            print(row(result), flush=True)


if __name__ == "__main__":
    main()
