"""Training without a backward pass: LoRA on SmolLM2-135M-Instruct by differences and in forward mode.

    trainjax fetch smollm2-135m-instruct
    PYTHONPATH=. python experiments/zeroth_order/run.py --out runs/zeroth_order

The same rows for all; Adam. Gradients by backpropagation, by `optim.two_point` with one direction or
four, and by `optim.forward_gradient`. A step of each costs another number of forward passes, so the
curves are over seconds. Memory is the temporaries of the gradient, compiled in float32 for 8 rows of 512
tokens. Appends to OUT/runs.jsonl, reads what is there; writes OUT/table.md and OUT/zeroth_order.png.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import workloads
from trainjax import optim, train
from trainjax.types import Gradient, Objective

WAYS: dict[str, tuple[Gradient, float, int]] = {  # gradient, learning rate, steps
    "backpropagation": (train.backpropagation, 3e-4, 40),
    "two_point": (optim.two_point(1e-3), 1e-4, 120),
    "two_point, 1e-3": (optim.two_point(1e-3), 1e-3, 120),
    "two_point, 4 directions": (optim.two_point(1e-3, 4), 2e-4, 40),
    "forward": (optim.forward_gradient(), 1e-4, 120),
    "forward, 1e-3": (optim.forward_gradient(), 1e-3, 120),
    "forward, 4 directions": (optim.forward_gradient(4), 2e-4, 40),
}


def temporaries(work: workloads.Workload, gradient: Gradient | None) -> float:
    """MB that the program of one gradient, or of the loss alone, takes beside arguments and result."""
    weights = np.full((8, 512), 1 / 4096, np.float32)
    batch = {"tokens": np.zeros((8, 512), np.int32), "weights": weights}

    def one(params: Any, loss: Any, key: Any) -> Any:
        if gradient is None:
            return loss(params, batch)[0]
        rows = {**batch, "step": 0}
        objective = Objective(loss, lambda other: other, lambda fn: fn(rows, None), key)
        return gradient(objective, params)[0]

    program = jax.jit(one).lower(work.first(0), work.loss, jax.random.key(0)).compile()
    return program.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = workloads.arguments(parser, "runs/zeroth_order", every=8)
    work = workloads.lora()

    def run(name: str) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            gradient, rate, steps = WAYS[name]
            tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
            step = train.make_step(tx, gradient=gradient)
            found = workloads.trained(work, tx, step, steps=steps, every=args.every)
            found.pop("records")
            return found

        return workloads.remembered(args.out / "runs.jsonl", {"name": name}, make)

    start, wide = work.evaluate(work.first(0)), workloads.lora(jnp.float32)
    table = f"Before training: {start:.4f}. The loss alone: {temporaries(wide, None):.0f} MB.\n\n"
    table += "| gradient | rate | steps | held-out loss | s a step | temporaries, MB |\n"
    table += "|---|---|---|---|---|---|\n"
    figure = Figure((6.8, 4.0), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name, (gradient, rate, steps) in WAYS.items():
        found = run(name)
        cells = [name.removesuffix(", 1e-3"), f"{rate:.0e}", f"{steps}"]
        cells += [f"{found['curve'][-1]:.4f}", f"{found['seconds']:.2f}"]
        cells.append(f"{temporaries(wide, gradient):.0f}")
        table += f"| {' | '.join(cells)} |\n"
        at = args.every * np.arange(len(found["curve"]) + 1) * found["seconds"]
        axes.plot(at, [start, *found["curve"]], "o-", markersize=3, label=name)
    axes.set(xlabel="seconds of steps", ylabel="held-out loss")
    axes.legend(frameon=False)
    figure.savefig(args.out / "zeroth_order.png")
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
