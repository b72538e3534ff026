"""Three tasks one after another on SmolLM2-135M-Instruct: what each method keeps, and what it costs.

    trainjax fetch smollm2-135m-instruct
    python experiments/forgetting/run.py --out runs/forgetting

Every method is a run of its own under --out, and one that is there is not run again: cut it anywhere
and start it anew. Writes table.md, matrices.png and tradeoff.png beside the runs, after each of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from trainjax.data import tasks
from trainjax.recipes import continual
from trainjax.recipes._common import PeftConfig

KINDS = ("train", "test")
MODEL = "smollm2-135m-instruct"
TASKS = ("convert_units", "reverse_words", "sort_numbers")
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "sequential"},
    {"name": "ewc", "strength": 1e3},
    {"name": "ewc", "strength": 1e4},
    {"name": "online_ewc", "strength": 1e3},
    {"name": "l2_sp", "strength": 0.01},
    {"name": "l2_sp", "strength": 0.1},
    {"name": "replay", "strength": 0.25},
    {"name": "hft"},
    {"name": "reg_lora", "strength": 2500.0},
    {"name": "joint"},
)


def label(method: dict[str, Any]) -> str:
    """The method's name with its strength, if it has one."""
    return f"{method['name']} {method['strength']:g}" if "strength" in method else method["name"]


def write_rows(out: Path, train: int, test: int, seed: int) -> None:
    """A file of questions to learn from and one of others to measure on, for each task."""
    for number, name in enumerate(TASKS):
        only = {name: tasks.TASKS[name]}
        first = tasks.rows(train, 1000 * seed + number, tasks=only)
        other = tasks.rows(
            test, 1000 * seed + 100 + number, without=tasks.questions(first), tasks=only
        )
        for kind, rows in (("train", first), ("test", other)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{name}.{kind}.jsonl").write_text(lines)


def learn(folder: Path, method: dict[str, Any], args: argparse.Namespace) -> None:
    """A method's run, unless it is there."""
    if (folder / "adapter").exists():
        return
    rows = {kind: tuple(f"{args.out}/{t}.{kind}.jsonl" for t in TASKS) for kind in KINDS}
    continual.main(
        continual.Config(
            model=MODEL,
            tasks=rows["train"],
            eval_tasks=rows["test"],
            out=folder,
            method=continual.MethodConfig(**method),
            exact_match=args.questions,
            max_new_tokens=24,
            steps=args.steps,
            batch_size=3,
            max_length=128,
            learning_rate=1e-3,
            warmup=2,
            dtype="bfloat16",
            peft=PeftConfig(rank=8, alpha=16.0),
            seed=args.seed,
            resume=folder.exists(),
        )
    )


def result(folder: Path) -> dict[str, Any]:
    """What a finished run has found: the matrix of right answers as an array, and its measures."""
    found = json.loads((folder / "forgetting.json").read_text())
    return found["measures"] | {"matrix": np.asarray(found["scores"]["exact_match"])}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line a method: the scores of every task in the end, and those of new tasks as they are learned."""
    heads = [*(f"{name}, in the end" for name in TASKS), "average", "new as learned", "kept of old"]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, found in results.items():
        *_, last = found["matrix"]
        in_turn = len(found["matrix"]) == len(TASKS)
        new = f"{np.diag(found['matrix'])[1:].mean():.0%}" if in_turn else ""
        kept = f"{found['retention']:.0f}%" if "retention" in found else ""
        cells = [*(f"{score:.0%}" for score in last), f"{last.mean():.0%}", new, kept]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_matrices(results: dict[str, dict[str, Any]], path: Path) -> None:
    """A heat map for each method: time goes down, tasks go across."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure((2.4 * columns + 0.8, 1.5 * rows + 0.9), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (name, found) in zip(axes.flat, results.items(), strict=False):
        matrix = 100 * found["matrix"]
        matrix = np.vstack([np.full((len(TASKS) - len(matrix), len(TASKS)), np.nan), matrix])
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                color = "white" if value > 60 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
        axis.set_title(name, loc="left", fontsize="medium")
        axis.set_xticks(range(len(TASKS)), [task.split("_")[0] for task in TASKS])
        axis.set_yticks(range(len(TASKS)), [f"after {task.split('_')[0]}" for task in TASKS])
    figure.suptitle("right answers, %", x=0.01, ha="left")
    figure.savefig(path)


def plot_tradeoff(results: dict[str, dict[str, Any]], path: Path) -> None:
    """What is kept of old tasks against what is learned of new ones."""
    figure = Figure((7, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    in_turn = {name: found for name, found in results.items() if "retention" in found}
    ordered = sorted(in_turn.items(), key=lambda item: -item[1]["retention"])
    for number, (name, found) in enumerate(ordered):
        place = 100 * np.diag(found["matrix"])[1:].mean(), found["retention"]
        side = (
            {"xytext": (6, -3), "ha": "left"} if number % 2 else {"xytext": (-6, -3), "ha": "right"}
        )
        axes.plot(*place, "o", color="C0")
        axes.annotate(name, place, textcoords="offset points", fontsize=8, **side)
    axes.axhline(90, color="0.6", linestyle="--", linewidth=1)
    axes.annotate("90%", (95, 90), xytext=(4, 3), textcoords="offset points", color="0.4")
    axes.set(xlabel="right answers on new tasks as they are learned, %", xlim=(40, 100))
    axes.set(ylabel="kept of old tasks in the end, %", ylim=(0, 105))
    figure.savefig(path)


def main() -> None:
    """Runs what is not there yet, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    write_rows(args.out, 300, args.questions, args.seed)
    results: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        folder = args.out / label(method).replace(" ", "-")
        learn(folder, method, args)
        results[label(method)] = result(folder)
        (args.out / "table.md").write_text(table(results))
        plot_matrices(results, args.out / "matrices.png")
        plot_tradeoff(results, args.out / "tradeoff.png")
    print(table(results))


if __name__ == "__main__":
    main()
