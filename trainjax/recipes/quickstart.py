"""See it work: fetch a small model, teach it six tasks, measure it before and after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from trainjax.data import tasks
from trainjax.evals import ExactMatch, exact_match
from trainjax.io import fetch
from trainjax.recipes import _common as common
from trainjax.recipes import _run_folder as run_folder
from trainjax.recipes import sft

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Fetches SmolLM2-135M-Instruct and fine-tunes it with LoRA on questions made by program."""

    out: Path = Path("runs/quickstart")
    """Folder of the run."""
    model: str = "smollm2-135m-instruct"
    """A name that `trainjax fetch` knows, a hub id, a folder or a .gguf file."""
    examples: int = 900
    """Questions to learn from."""
    held_out: int = 60
    """Questions to measure on, none of which is learnt from."""
    seed: int = 0
    """Random seed of the questions, the adapter's start and the order of the data."""
    resume: bool = False
    """Continue the run in --out."""


def main(config: Config) -> None:
    """Runs the job."""
    run_folder.claim(config.out, resume=config.resume)
    if config.model in fetch.CATALOG:
        fetch.fetch(config.model, common.say)
    train = tasks.rows(config.examples, config.seed)
    test = tasks.rows(config.held_out, config.seed + 1, without=tasks.questions(train))
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (config.out / f"{name}.jsonl").write_text(text, encoding="utf-8")

    common.say(f"Asking {config.model} {len(test)} questions before training ...")
    before = exact_match(common.load_model(config.model), test)
    common.say(f"{before.score:.0%} right. Training on {len(train)} others ...")
    sft.main(_training(config))
    common.say("Asking again ...")
    after = exact_match(common.load_model(config.model, adapter=config.out / "adapter"), test)

    _plot(config.out, before, after)
    _show(test, before, after)
    result = {"before": before._asdict(), "after": after._asdict()}
    (config.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    common.say(
        f"\nThe picture: {config.out}/quickstart.png. The adapter, in PEFT's format: {config.out}/adapter\n"
        f"Talk to it: trainjax chat --model {config.model} --adapter {config.out} "
        f"--temperature 0 --system '{tasks.SYSTEM}'"
    )


def _training(config: Config) -> sft.Config:
    return sft.Config(
        model=config.model,
        data=str(config.out / "train.jsonl"),
        out=config.out,
        batch_size=max(2, jax.device_count()),
        max_length=256,
        learning_rate=1e-3,
        save_every=20,
        seed=config.seed,
        resume=config.resume,
        peft=common.PeftConfig(rank=16, alpha=32.0),
    )


def _show(test: Rows, before: ExactMatch, after: ExactMatch) -> None:
    console = Console()
    table = Table("task", "before", "after", title="exact match", title_justify="left")
    for task in after.by_task:
        table.add_row(task, f"{before.by_task[task]:.0%}", f"{after.by_task[task]:.0%}")
    table.add_section()
    table.add_row("all", f"{before.score:.0%}", f"{after.score:.0%}", style="bold")
    console.print(table)
    for number in _telling(test, before, after):
        *_, question, answer = (message["content"] for message in test[number]["messages"])
        console.print(f"\n[bold]{question}[/bold]")
        console.print(f"  before  {_one_line(before.answers[number])}", markup=False)
        console.print(f"  after   {_one_line(after.answers[number])}", markup=False)
        console.print(f"  right   {answer}", markup=False)


def _telling(test: Rows, before: ExactMatch, after: ExactMatch) -> Sequence[int]:
    """Three questions, of three tasks, whose answer changed most: from wrong to right where there are."""
    right = [row["messages"][-1]["content"] for row in test]
    gained = [
        (after.answers[i].strip() == right[i]) - (before.answers[i].strip() == right[i])
        for i in range(len(test))
    ]
    chosen: dict[str, int] = {}
    for i in sorted(range(len(test)), key=lambda i: -gained[i]):
        chosen.setdefault(test[i]["task"], i)
    return list(chosen.values())[:3]


def _one_line(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _plot(out: Path, before: ExactMatch, after: ExactMatch) -> None:
    from matplotlib.figure import Figure

    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    records = [record for record in records if "loss" in record]
    figure = Figure((9, 3.6), layout="constrained", dpi=130)
    loss, score = figure.subplots(1, 2)
    loss.plot([r["num_tokens"] / 1000 for r in records], [r["loss"] for r in records], color="C0")
    loss.set(
        xlabel="thousand tokens", ylabel="loss (nats per token)", yscale="log", title="training"
    )
    names = list(after.by_task)
    for offset, result, label, color in (
        (-0.2, before, "before", "0.7"),
        (0.2, after, "after", "C0"),
    ):
        places = [i + offset for i in range(len(names))]
        shares = [100 * result.by_task[name] for name in names]
        score.barh(places, shares, 0.4, label=f"{label}: {result.score:.0%} of all", color=color)
    score.set(xlabel="right answers, %", xlim=(0, 100), title="held-out questions")
    score.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    score.invert_yaxis()
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(out / "quickstart.png")
