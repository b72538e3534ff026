"""Precision of compute and of what trains: loss, memory and time of a small decoder from scratch.

    PYTHONPATH=. python experiments/precision/run.py --out runs/precision

AdamW at 3e-3 for 200 steps, three seeds; memory is arguments and temporaries of the compiled step. Then the
same step with everything that `nn.remat` can keep. Appends to OUT/runs.jsonl, reads what is there; writes
OUT/table.md and OUT/precision.png.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import workloads
from trainjax import optim, train, tree
from trainjax.recipes._common import REMAT

same = lambda tx: tx  # noqa: E731
MODES: dict[str, tuple[dict[str, Any], Any, Callable[[Any], Any]]] = {
    "float32": ({}, jnp.float32, same),
    "bfloat16 compute, float32 masters": ({"compute_dtype": jnp.bfloat16}, jnp.float32, same),
    "bfloat16 masters, to the nearest": ({"compute_dtype": jnp.bfloat16}, jnp.bfloat16, same),
    "bfloat16 masters, stochastic": (
        {"compute_dtype": jnp.bfloat16},
        jnp.bfloat16,
        optim.with_stochastic_rounding,
    ),
    "float16 compute, scaled loss": (
        {"compute_dtype": jnp.float16},
        jnp.float32,
        optim.with_loss_scale,
    ),
    "fp8 products, bfloat16 else": (
        {"compute_dtype": jnp.bfloat16, "fp8": True},
        jnp.float32,
        same,
    ),
}


def memory(work: workloads.Workload, tx: Any, params: Any) -> dict[str, float]:
    """MB of the gradient's program, and of params with the optimizer's state."""
    batch = next(work.batches(0))
    gradient = jax.jit(jax.grad(lambda params, loss: loss(params, batch)[0]))
    told = gradient.lower(params, work.loss).compile().memory_analysis()
    state = tree.num_bytes(tx.init(params)) + tree.num_bytes(params)
    return {"temporaries": told.temp_size_in_bytes / 1e6, "held": state / 1e6}


def remat_table(rounds: int = 9) -> str:
    """Temporaries and time of the gradient by what is kept, 32 rows of 128."""
    table = "| kept | temporaries, MB | s | time over keeping all |\n|---|---|---|---|\n"
    programs, times, sizes = {}, {}, {}
    for name, policy in REMAT.items():
        work = workloads.scratch(remat=policy, rows=32)
        params, batch = work.first(0), next(work.batches(0))
        gradient = jax.jit(jax.grad(lambda params, loss, batch: loss(params, batch)[0]))
        program = gradient.lower(params, work.loss, batch).compile()
        sizes[name] = program.memory_analysis().temp_size_in_bytes / 1e6
        programs[name] = lambda program=program, args=(params, work.loss, batch): program(*args)
        times[name] = []
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name in programs:
        ratio = middle[name] / middle["none"]
        table += f"| {name} | {sizes[name]:.1f} | {middle[name]:.3f} | {ratio:.2f} |\n"
    return table


def main() -> None:
    """Runs what is not done yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = workloads.arguments(parser, "runs/precision", steps=200, seeds=3)

    def run(name: str, seed: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            settings, dtype, around = MODES[name]
            work = workloads.scratch(**settings)
            schedule = optim.linear(3e-3, args.steps, args.steps // 20)
            tx = around(optim.chain(optim.Chain(learning_rate=schedule, weight_decay=0.1)))
            params = tree.cast(work.first(seed), dtype)
            found = workloads.trained(
                work, tx, train.make_step(tx), steps=args.steps, every=10, seed=seed, params=params
            )
            last = found.pop("records")[-1]
            told = {"skipped": last.get("skipped_steps", 0.0)}
            return found | told | memory(work, tx, params)

        return workloads.remembered(args.out / "runs.jsonl", {"name": name, "seed": seed}, make)

    table = (
        "| mode | held-out loss | params and state, MB | temporaries, MB | skipped | s a step |\n"
    )
    table += "|---|---|---|---|---|---|\n"
    figure = Figure((6.8, 4.0), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name in MODES:
        own = [run(name, seed) for seed in range(args.seeds)]
        last = [found["curve"][-1] for found in own]
        cells = [name, f"{np.mean(last):.4f} ± {np.std(last):.4f}", f"{own[0]['held']:.1f}"]
        cells += [f"{own[0]['temporaries']:.1f}", f"{max(found['skipped'] for found in own):.0f}"]
        cells += [f"{statistics.median(found['seconds'] for found in own):.3f}"]
        table += f"| {' | '.join(cells)} |\n"
        curve = np.mean([found["curve"] for found in own], axis=0)
        axes.plot(10 * np.arange(1, len(curve) + 1), curve, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="held-out loss", ylim=(None, 2.6))
    axes.legend(frameon=False)
    figure.savefig(args.out / "precision.png")
    table += f"\n{remat_table()}"
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
