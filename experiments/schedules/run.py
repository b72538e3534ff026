"""Forms of the learning rate over a run, at equal peaks and steps: a small decoder from scratch.

    PYTHONPATH=. python experiments/schedules/run.py --out runs/schedules

AdamW for 200 steps at two peaks and, at each form's best, three seeds. "refined" is made of the gradient
norms of the constant run at the same peak, and so costs another run. Appends to OUT/runs.jsonl, reads what
is there; writes OUT/table.md and OUT/schedules.png.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import workloads
from trainjax import optim, train

PEAKS = (2e-3, 5e-3)
FORMS: dict[str, Callable[..., optax.Schedule]] = {
    "constant": optim.constant,
    "cosine": optim.warmup_cosine,
    "linear": optim.linear,
    "wsd": optim.wsd,
    "wsd, root": lambda *args: optim.wsd(*args, root=True),
    "one_cycle": lambda rate, steps, warmup: optim.one_cycle(rate, steps, 0.3),
    "restarts": optim.cosine_restarts,
    "inverse_sqrt": optim.inverse_sqrt,
}


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = workloads.arguments(parser, "runs/schedules", steps=200, seeds=3)
    work, steps = workloads.scratch(), args.steps

    def run(name: str, peak: float, seed: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            if name == "refined":
                norms = run("constant", peak, 0)["grad_norms"]
                schedule = optim.refined(peak, steps, steps // 20, grad_norms=norms, power=1.0)
            else:
                schedule = FORMS[name](peak, steps, steps // 20)
            tx = optim.chain(optim.Chain(learning_rate=schedule, weight_decay=0.1))
            step = train.make_step(tx)
            found = workloads.trained(work, tx, step, steps=steps, every=10, seed=seed)
            norms = [record["grad_norm"] for record in found.pop("records")]
            rates = np.asarray([float(schedule(number)) for number in range(0, steps, 10)])
            return found | {"grad_norms": norms, "rates": (rates / peak).tolist()}

        key = {"name": name, "peak": peak, "seed": seed}
        return workloads.remembered(args.out / "runs.jsonl", key, make)

    table = "| form | peak | held-out loss, three seeds | other peaks |\n|---|---|---|---|\n"
    figure = Figure((9.0, 3.8), layout="constrained", dpi=130)
    forms, curves = figure.subplots(1, 2)
    for name in (*FORMS, "refined"):
        trials = [run(name, peak, 0) for peak in PEAKS]
        best = min(trials, key=lambda trial: trial["curve"][-1])
        own = [best, *(run(name, best["peak"], seed) for seed in range(1, args.seeds))]
        last = [found["curve"][-1] for found in own]
        others = ", ".join(f"{t['peak']:g}: {t['curve'][-1]:.3f}" for t in trials if t is not best)
        spread = f"{np.mean(last):.4f} ± {np.std(last):.4f}"
        table += f"| {name} | {best['peak']:g} | {spread} | {others} |\n"
        at = 10 * np.arange(1, len(best["curve"]) + 1)
        forms.plot(10 * np.arange(len(best["rates"])), best["rates"], label=name, linewidth=1.2)
        curves.plot(at, np.mean([found["curve"] for found in own], axis=0), linewidth=1.2)
    forms.set(xlabel="step", ylabel="rate over its peak")
    curves.set(xlabel="step", ylabel="held-out loss", ylim=(None, 2.6))
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(args.out / "schedules.png")
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
