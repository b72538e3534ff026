"""What the Fisher of every weight of SmolLM2 costs, beside a training step on the same rows.

    python experiments/benchmarks/fisher.py

Rows are padded to 256 tokens, 8 a batch, in float32. Each side runs in a process of its own; the sides
alternate, and medians are printed as a table in Markdown: seconds an example, peak resident set, and that
peak less the weights and the process without a model, in copies of the weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from rows import benchmark_rows

import trainjax as tj
from trainjax import data, tree

ROWS, BATCH, LENGTH = 32, 8, 256


def measure(side: str) -> dict[str, float]:
    """Seconds an example over the second pass (the first compiles), and what memory it took."""
    empty = peak()
    model = tj.load("smollm2-135m-instruct")
    loss = tj.losses.sft(tj.policy(model))
    examples = data.encode(benchmark_rows(count=ROWS), model.tokenizer, LENGTH)
    plan = data.Plan(BATCH, LENGTH, data.unpacked, buckets=1)
    weights = tree.num_bytes(model.params)
    if side == "loaded":
        return {"seconds": 0.0, "peak": peak(), "extra": (peak() - empty) / weights - 1}
    run = {"fisher": fishers, "step": steps}[side](
        loss, model, lambda: data.one_epoch(examples, plan)
    )
    run()
    start = time.perf_counter()
    run()
    seconds = (time.perf_counter() - start) / len(examples)
    return {"seconds": seconds, "peak": peak(), "extra": (peak() - empty) / weights - 1}


def fishers(loss: Any, model: Any, batches: Any) -> Any:
    """A pass that ends with the Fisher."""
    return lambda: jax.block_until_ready(tj.estimate.fisher(loss, model.params, batches()))


def steps(loss: Any, model: Any, batches: Any) -> Any:
    """A pass of AdamW over every weight, as `trainjax sft --full` makes its steps."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    step, state = tj.train.make_step(tx), [tj.train.init(model.params, tx)]

    def run() -> None:
        for batch in batches():
            state[0], metrics = step(state[0], loss, batch)
        jax.block_until_ready(metrics)

    return run


def peak() -> int:
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Alternates the sides, each in a process of its own; with `--side` measures one, here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", choices=("loaded", "step", "fisher"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side)))
        return
    found: dict[str, list[dict[str, float]]] = {"loaded": [], "step": [], "fisher": []}
    for _ in range(args.repeats):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    print("| | seconds an example | peak, GB | beyond the weights, in copies of them |")
    print("|---|---|---|---|")
    for side, results in found.items():
        middle = {k: statistics.median(r[k] for r in results) for k in results[0]}
        seconds = "" if side == "loaded" else f"{middle['seconds']:.3f}"
        print(f"| {side} | {seconds} | {middle['peak'] / 1e9:.2f} | {middle['extra']:.2f} |")
    pairs = zip(found["fisher"], found["step"], strict=True)
    ratio = np.median([fisher["seconds"] / step["seconds"] for fisher, step in pairs])
    print(f"\nThe Fisher takes {ratio:.2f} times a step's time for each example.")


if __name__ == "__main__":
    main()
