"""Four workers that send less: the loss of a small decoder against the bytes that its gradients take.

    PYTHONPATH=. python experiments/gradient_compression/run.py --out runs/gradient_compression

Four devices of one process on the CPU; AdamW at 3e-3 for 150 steps, 8 rows of 128 between them. Bytes
are what a worker sends to have a gradient summed, whatever the network makes of it. Appends to
OUT/runs.jsonl, reads what is there; writes OUT/table.md and OUT/gradient_compression.png.
"""

import argparse
import os
from typing import Any

os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "16"}

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import workloads
from trainjax import optim, parallel, train, tree
from trainjax.optim import compression
from trainjax.train.workers import init_workers, make_worker_step

WAYS: dict[str, optax.GradientTransformation] = {
    "int8": compression.int8("data"),
    "power_sgd, rank 8": compression.power_sgd("data", rank=8),
    "power_sgd, rank 2": compression.power_sgd("data", rank=2),
    "one_bit after 15 steps": compression.one_bit("data", warmup=15),
    "one_bit at once": compression.one_bit("data", warmup=0),
}


def run(work: workloads.Workload, name: str, steps: int, seed: int) -> dict[str, Any]:
    """The held-out loss every ten steps, and the bytes that a worker has sent by then."""
    mesh = parallel.mesh(data=4, fsdp=1)
    tx = optim.chain(
        optim.Chain(learning_rate=optim.linear(3e-3, steps, steps // 20), weight_decay=0.1)
    )
    if name == "float32":
        state, step = train.init(work.first(seed), tx, seed), train.make_step(tx)
    else:
        state = init_workers(work.first(seed), tx, WAYS[name], mesh, seed)
        step = make_worker_step(tx, WAYS[name], mesh)
    size = 4.0 * tree.count(state.params)
    place, batches = parallel.rows(mesh), work.batches(seed)
    sent, curve, of_bytes = 0.0, [], []
    for number in range(1, steps + 1):
        batch = next(batches)
        batch = batch if name == "float32" else jax.device_put(batch, place)
        state, metrics = step(state, work.loss, batch)
        sent += float(metrics.get("bytes_sent", size))
        if number % 10 == 0:
            curve.append(work.evaluate(jax.device_get(state.params)))
            of_bytes.append(sent)
    return {"curve": curve, "bytes": of_bytes}


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = workloads.arguments(parser, "runs/gradient_compression", steps=150, seeds=3)
    work = workloads.scratch()
    table = "| gradients | held-out loss | MB sent by a worker | less than float32 |\n|---|---|---|---|\n"
    figure = Figure((6.8, 4.0), layout="constrained", dpi=130)
    axes = figure.subplots()
    whole = None
    for name in ("float32", *WAYS):
        own = [
            workloads.remembered(
                args.out / "runs.jsonl",
                {"name": name, "seed": seed},
                lambda name=name, seed=seed: run(work, name, args.steps, seed),
            )
            for seed in range(args.seeds)
        ]
        last, sent = [found["curve"][-1] for found in own], own[0]["bytes"]
        whole = whole or sent[-1]
        cells = [name, f"{np.mean(last):.4f} ± {np.std(last):.4f}", f"{sent[-1] / 1e6:.1f}"]
        cells.append(f"{1 - sent[-1] / whole:.1%}")
        table += f"| {' | '.join(cells)} |\n"
        curve = np.mean([found["curve"] for found in own], axis=0)
        axes.plot(np.asarray(sent) / 1e6, curve, label=name, linewidth=1.2)
    axes.set(xscale="log", xlabel="MB sent by a worker", ylabel="held-out loss", ylim=(None, 3.6))
    axes.legend(frameon=False)
    figure.savefig(args.out / "gradient_compression.png")
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
