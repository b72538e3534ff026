"""Two tasks added, one taken away: arithmetic on what fine-tuning has changed in SmolLM2-135M-Instruct.

    trainjax fetch smollm2-135m-instruct
    python experiments/task_arithmetic/run.py --out runs/task_arithmetic

Trains an adapter on each of two small tasks, merges each into the weights (a task vector is the difference
from the base), and then makes models of the vectors with the job `trainjax merge`: their sum at several
strengths by task arithmetic, TIES and DARE, and both tasks less one of them. Every model answers held-out
questions of both tasks, and its loss on dialogues that nobody trained on is measured. Skips models that
are there, so an interrupted run goes on; writes OUT/table.md and OUT/task_arithmetic.png.
"""

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

import trainjax as tj
from trainjax import data, losses, train
from trainjax.data import tasks
from trainjax.evals import exact_match
from trainjax.recipes import merge, sft
from trainjax.recipes._common import PeftConfig

DATA = Path(__file__).resolve().parents[3] / "shared/data"
MODEL = "smollm2-135m-instruct"
TASKS = ("convert_units", "reverse_words")


def write_rows(out: Path, seed: int) -> None:
    """Questions to learn from and others to measure on, for each task and for both."""
    both = []
    for number, name in enumerate(TASKS):
        only = {name: tasks.TASKS[name]}
        first = tasks.rows(384, 1000 * seed + number, tasks=only)
        other = tasks.rows(
            64, 1000 * seed + 100 + number, without=tasks.questions(first), tasks=only
        )
        both += first
        for kind, rows in (("train", first), ("test", other)):
            (out / f"{name}.{kind}.jsonl").write_text(_lines(rows))
    (out / "both.train.jsonl").write_text(_lines(both))


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tuned(name: str, out: Path, args: argparse.Namespace) -> Path:
    """A model folder that has learned the rows of that name."""
    folder = out / f"model-{name}"
    if folder.exists():
        return folder
    shutil.rmtree(out / f"run-{name}", ignore_errors=True)
    sft.main(
        sft.Config(
            model=str(out / "base"),
            data=str(out / f"{name}.train.jsonl"),
            out=out / f"run-{name}",
            steps=args.steps,
            batch_size=4,
            max_length=128,
            learning_rate=1e-3,
            dtype="bfloat16",
            peft=PeftConfig(rank=16, alpha=32.0),
            seed=args.seed,
        )
    )
    adapter = out / f"run-{name}" / "adapter"
    merge.main(merge.Config(model=str(out / "base"), adapter=adapter, out=folder))
    return folder


def recipes(parts: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Models by name: what the job `trainjax merge` is asked for."""
    first, second = (str(parts[name]) for name in TASKS)
    both = str(parts["both"])
    made: dict[str, dict[str, Any]] = {}
    for scale in (0.5, 0.7, 1.0):
        made[f"sum, {scale:g}"] = {"models": (first, second), "weights": (scale, scale)}
    for scale in (1.0, 1.5):
        made[f"ties, {scale:g}"] = {
            "method": "ties",
            "models": (first, second),
            "density": 0.3,
            "scale": scale,
        }
    made["dare, 0.7"] = {
        "method": "dare_linear",
        "models": (first, second),
        "density": 0.5,
        "weights": (0.7, 0.7),
    }
    for scale in (0.5, 1.0):
        made[f"both less {TASKS[1]}, {scale:g}"] = {
            "models": (both, second),
            "weights": (1.0, -scale),
        }
        made[f"base less {TASKS[1]}, {scale:g}"] = {"models": (second,), "weights": (-scale,)}
    return {name: {"method": "task_arithmetic"} | settings for name, settings in made.items()}


def measured(folder: Path, out: Path) -> dict[str, float]:
    """Right answers on both tasks, and the loss on dialogues."""
    model = tj.load(folder, compute_dtype=jax.numpy.bfloat16)
    found = {}
    for name in TASKS:
        rows = [json.loads(line) for line in (out / f"{name}.test.jsonl").read_text().splitlines()]
        found[name] = exact_match(model, rows, max_new_tokens=24).score
    with gzip.open(DATA / "dialogues.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        talk = [json.loads(line) for line in lines]
    examples = data.encode(talk, model.tokenizer, 256)
    loss, plan = losses.sft(tj.policy(model)), data.Plan(4, 256)
    evaluate = train.evaluator(loss, lambda: data.one_epoch(examples, plan))
    return found | {"dialogues": evaluate(model.params)["eval_loss"]}


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """Right answers on each task, and the loss on dialogues, a line for each model."""
    figure = Figure((8.4, 5.0), layout="constrained", dpi=130)
    right, talk = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, task in enumerate(TASKS):
        places = [line + 0.36 * (number - 0.5) for line in range(len(results))]
        right.barh(places, [100 * found[task] for found in results.values()], 0.34, label=task)
    talk.plot(
        [found["dialogues"] for found in results.values()], range(len(results)), "o", color="C2"
    )
    talk.axvline(results["base"]["dialogues"], color="0.6", linewidth=0.8)
    right.set_yticks(range(len(results)), list(results))
    right.invert_yaxis()
    right.set(xlabel="right answers, %", xlim=(0, 100))
    right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.1))
    talk.set(xlabel="loss on dialogues")
    talk.grid(axis="y", color="0.94")
    figure.savefig(path)


def main() -> None:
    """Makes and measures every model that is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/task_arithmetic"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the dialogues are not at {DATA}")
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out, args.seed)
    if not (out / "base").exists():
        tj.save_model(out / "base", tj.load(MODEL, dtype=jax.numpy.bfloat16))
    parts = {name: tuned(name, out, args) for name in (*TASKS, "both")}
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, settings in recipes(parts).items():
        if name in results:
            continue
        merged = out / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merge.main(merge.Config(model=str(out / "base"), out=merged, **settings))
        results[name] = measured(merged, out)
        file.write_text(json.dumps(results, indent=1))
    for name, folder in {"base": out / "base", **parts}.items():
        if name not in results:
            results[name] = measured(folder, out)
            file.write_text(json.dumps(results, indent=1))
    order = ["base", *parts, *recipes(parts)]
    results = {name: results[name] for name in order}
    table = f"| model | {TASKS[0]} | {TASKS[1]} | loss on dialogues |\n|---|---|---|---|\n"
    for name, found in results.items():
        scores = " | ".join(f"{found[task]:.0%}" for task in TASKS)
        table += f"| {name} | {scores} | {found['dialogues']:.3f} |\n"
    (out / "table.md").write_text(table)
    plot(results, out / "task_arithmetic.png")
    print(table)


if __name__ == "__main__":
    main()
