"""Which optimizer reaches a loss first: a small decoder from scratch, and LoRA on SmolLM2-135M-Instruct.

    PYTHONPATH=. python experiments/optimizers/run.py scratch --out runs/optimizers
    trainjax fetch smollm2-135m-instruct
    PYTHONPATH=. python experiments/optimizers/run.py lora --out runs/optimizers

In the manner of AlgoPerf: every optimizer has the same number of steps, batches and trials of its learning
rate (its other settings stay at their defaults; Sophia's gamma see below), and is then run with the best of
them from other seeds.
The target is the held-out loss that AdamW has after nine tenths of its steps, in the mean over seeds; the
time to target is the first evaluation at which the mean curve is no higher. The schedule is warm-up, then a
line to zero at the last step; schedule_free stays up. Steps are timed by turns at the end. Both workloads are
in experiments/workloads.py.

Appends a line to OUT/WORKLOAD.jsonl as soon as a run is done and reads those that are there; writes
OUT/WORKLOAD.md and OUT/WORKLOAD.png.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import workloads
from trainjax import optim, train
from trainjax.recipes._optim import OPTIMIZERS

TRIALS: dict[str, dict[str, tuple[float, ...]]] = {  # learning rates
    "scratch": {
        "adamw": (1e-3, 3e-3, 1e-2),
        "adamw_8bit": (1e-3, 3e-3, 1e-2),
        "lion": (3e-4, 1e-3, 3e-3),
        "sophia_g": (3e-4, 1e-3, 3e-3),
        "sophia_h": (3e-4, 1e-3, 3e-3),
        "muon": (3e-3, 1e-2, 3e-2),
        "schedule_free": (1e-3, 3e-3, 1e-2),
        "fira": (1e-2, 3e-2, 1e-1),
    },
    "lora": {
        "adamw": (1e-3, 3e-3, 1e-2),
        "adamw_8bit": (1e-3, 3e-3, 1e-2),
        "lion": (1e-4, 3e-4, 1e-3),
        "sophia_g": (3e-4, 1e-3, 3e-3),
        "sophia_h": (3e-4, 1e-3, 3e-3),
        "muon": (1e-3, 3e-3, 1e-2),
        "schedule_free": (1e-3, 3e-3, 1e-2),
        "fira": (3e-3, 1e-2, 3e-2),
    },
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {"fira": {"rank": 32, "every": 50}},
    "lora": {"fira": {"rank": 4, "every": 20}},
}
SOPHIA: dict[str, dict[str, Any]] = {"sophia_g": {"gamma": 5.0}, "sophia_h": {"gamma": 1.0}}
"""Where 10 to 50% of the entries are not clipped, as the paper advises; at its 0.05 and 0.01, made for half a
million tokens a batch, it is 2% here."""
COLUMNS = (
    *("optimizer", "rate", "final loss", "less AdamW's, by seed", "steps to target", "of AdamW's"),
    *("s a step", "time, of AdamW's", "state, MB"),
)
STEPS = {"scratch": 400, "lora": 40}
EVERY = {"scratch": 10, "lora": 4}


def optimizer(workload: str, name: str, rate: float, steps: int) -> Any:
    """Decay is 0.1 and clipping 1 for all."""
    form = optim.constant if name == "schedule_free" else optim.linear
    settings = optim.Chain(
        optimizer=OPTIMIZERS[name],
        learning_rate=form(rate, steps, steps // 20),
        weight_decay=0.1,
        settings=(SETTINGS[workload] | SOPHIA).get(name, {}),
    )
    return optim.chain(settings)


def one(work: workloads.Workload, name: str, rate: float, seed: int, args: Any) -> dict[str, Any]:
    """One run; of Sophia's also the mean share of entries that were clipped."""
    steps = args.steps or STEPS[args.workload]
    tx, every = optimizer(args.workload, name, rate, steps), EVERY[args.workload]
    found = workloads.trained(
        work,
        tx,
        train.make_step(tx),
        steps=steps,
        every=every,
        seed=seed,
        curvature=work.curvature,
    )
    clipped = [record["clipped"] for record in found.pop("records") if "clipped" in record]
    return found | ({"clipped": float(np.mean(clipped))} if clipped else {})


def all_runs(work: workloads.Workload, args: Any) -> dict[str, list[dict[str, Any]]]:
    """Trials of the rate from one seed, then the best of them from the others."""
    file, runs = args.out / f"{args.workload}.jsonl", {}

    def run(name: str, rate: float, seed: int) -> dict[str, Any]:
        make = functools.partial(one, work, name, rate, seed, args)
        return workloads.remembered(file, {"name": name, "rate": rate, "seed": seed}, make)

    trials_of = TRIALS[args.workload]
    for name in args.only or trials_of:
        trials = [run(name, rate, 0) for rate in trials_of[name]]
        longest = max(len(trial["curve"]) for trial in trials)
        whole = [trial for trial in trials if len(trial["curve"]) == longest]
        best = min(whole, key=lambda trial: trial["curve"][-1])
        runs[name] = [best, *(run(name, best["rate"], seed) for seed in range(1, args.seeds))]
    return runs


def times(
    work: workloads.Workload, workload: str, names: Iterable[str], rounds: int = 3
) -> dict[str, float]:
    """Seconds of a step by optimizer: the median of rounds in which each does ten steps in its turn."""
    batch, started = next(work.batches(0)), {}
    for name in names:
        tx = optimizer(workload, name, 1e-5, 1000)
        started[name] = [train.make_step(tx), train.init(work.first(0), tx)]
    found: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(rounds + 1):
        for name, (step, state) in started.items():
            start = time.perf_counter()
            for _ in range(10):
                state, _ = step(state, work.loss, batch, curvature=work.curvature)
            jax.block_until_ready(state)
            found[name].append((time.perf_counter() - start) / 10)
            started[name][1] = state
    return {name: statistics.median(own[1:]) for name, own in found.items()}


def report(runs: dict[str, list[dict[str, Any]]], seconds: dict[str, float], args: Any) -> None:
    """The table and the curves."""
    every = EVERY[args.workload]
    mean = {name: np.mean([run["curve"] for run in own], axis=0) for name, own in runs.items()}
    target = mean["adamw"][int(0.9 * len(mean["adamw"])) - 1]
    first = {name: _first(curve, target, every) for name, curve in mean.items()}
    table = f"Target: a held-out loss of {target:.4f}.\n\n"
    table += f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
    for name, own in runs.items():
        last = [run["curve"][-1] for run in own]
        share = None if first[name] is None else first[name] / first["adamw"]
        slower = seconds[name] / seconds["adamw"]
        beside = np.subtract(last, [run["curve"][-1] for run in runs["adamw"]])
        cells = [name, f"{own[0]['rate']:.0e}", f"{np.mean(last):.4f} ± {np.std(last):.4f}"]
        cells.append(f"{np.mean(beside):+.4f} ± {np.std(beside):.4f}")
        cells += ["not reached", ""] if share is None else [f"{first[name]}", f"{share:.2f}"]
        cells += [f"{seconds[name]:.3f}", "" if share is None else f"{share * slower:.2f}"]
        cells.append(f"{own[0]['bytes'] / 1e6:.1f}")
        table += f"| {' | '.join(cells)} |\n"
    (args.out / f"{args.workload}.md").write_text(table)
    print(table)
    figure = Figure((8.0, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name, curve in mean.items():
        axes.plot(every * np.arange(1, len(curve) + 1), curve, label=name, linewidth=1.2)
    axes.axhline(target, color="0.7", linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss, mean over seeds")
    low, high = min(c[-1] for c in mean.values()), mean["adamw"][len(mean["adamw"]) // 10]
    axes.set_ylim(low - 0.05 * (high - low), high)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(args.out / f"{args.workload}.png")


def _first(curve: np.ndarray, target: float, every: int) -> int | None:
    below = np.nonzero(curve <= target)[0]
    return int(below[0] + 1) * every if len(below) else None


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workload", choices=("scratch", "lora"))
    parser.add_argument("--only", nargs="*", choices=TRIALS["scratch"])
    parser.add_argument("--runs-only", action="store_true", help="no times, table and curves")
    args = workloads.arguments(parser, "runs/optimizers", steps=None, seeds=3)
    work = {"scratch": workloads.scratch, "lora": workloads.lora}[args.workload]()
    runs = all_runs(work, args)
    if not args.runs_only:
        report(runs, times(work, args.workload, runs), args)


if __name__ == "__main__":
    main()
