"""Every parameter-efficient method at equal steps: SmolLM2-135M-Instruct on 50 tasks of instructions.

    trainjax fetch smollm2-135m-instruct
    python experiments/peft_methods/run.py --out runs/peft_methods

Reads ../shared/data/{instructions,dialogues}.{train,test}.jsonl.gz. Every method is a process of its own,
for its peak memory, and trains on the same batches in the same order; only its learning rate is its own.
Appends a line to OUT/results.jsonl as soon as a method is done, skips those that are there (so an
interrupted run goes on), and writes OUT/table.md and OUT/peft_methods.png.
"""

import argparse
import gzip
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainjax as tj
from trainjax import data, losses, train, tree
from trainjax.evals import exact_match
from trainjax.nn import remat
from trainjax.types import Batch, Loss, Params, Peft

DATA = Path(__file__).resolve().parents[3] / "shared/data"
MODEL = "smollm2-135m-instruct"


class Entry(NamedTuple):
    """A line of the table: the method, and the peak of its learning rate."""

    method: Callable[[], Peft]
    learning_rate: float


p = tj.peft
METHODS: dict[str, Entry] = {
    "full": Entry(lambda: p.full(), 5e-5),
    "partial, last 4 layers": Entry(lambda: p.partial(r"^layers/(26|27|28|29)/"), 1e-4),
    "lora": Entry(lambda: p.lora(), 5e-4),
    "rslora": Entry(lambda: p.lora(alpha=16.0, rslora=True), 5e-4),
    "lora_plus": Entry(lambda: p.lora_plus(), 1e-4),
    "lora_fa": Entry(lambda: p.lora_fa(), 5e-4),
    "dora": Entry(lambda: p.dora(), 5e-4),
    "pissa": Entry(lambda: p.pissa(), 1e-4),
    "adalora": Entry(lambda: p.adalora(), 2e-3),
    "vera": Entry(lambda: p.vera(), 2e-2),
    "tied_lora": Entry(lambda: p.tied_lora(), 2e-3),
    "molora": Entry(lambda: p.molora(rank=4), 5e-4),
    "bottleneck": Entry(lambda: p.bottleneck(), 1e-3),
    "ia3": Entry(lambda: p.ia3(), 1e-2),
    "bitfit": Entry(lambda: p.bitfit(add=True), 5e-3),
    "sparse": Entry(lambda: p.sparse(), 5e-4),
    "prompt": Entry(lambda: p.prompt(), 1e-2),
    "prefix": Entry(lambda: p.prefix(), 1e-2),
    "prefix, projected": Entry(lambda: p.prefix(prefix_projection=True), 1e-3),
}


class Setting(NamedTuple):
    """What all methods have in common."""

    model: tj.models.Model
    batches: list[Batch]
    test: list[Batch]
    dialogues: list[Batch]
    questions: list[dict[str, Any]]


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def spread(items: list[Any], count: int) -> list[Any]:
    """Evenly spaced ones, so that every task is among them."""
    return items[:: max(1, len(items) // count)][:count]


def setting(args: argparse.Namespace) -> Setting:
    """Reads model and data."""
    dtype = jnp.bfloat16
    model = tj.load(MODEL, dtype=dtype, compute_dtype=dtype, remat=remat.projections)

    def encoded(some: list[dict[str, Any]]) -> data.Examples:
        return data.encode(some, model.tokenizer, args.max_length, too_long=data.drop)

    plan = data.Plan(args.batch_size, args.max_length, seed=args.seed)
    loader = data.Loader(encoded(rows("instructions.train")), plan)
    held_out = [
        list(data.one_epoch(encoded(spread(rows(name), args.held_out)), plan))
        for name in ("instructions.test", "dialogues.test")
    ]
    batches = list(itertools.islice(loader, args.steps))
    return Setting(model, batches, *held_out, questions(model, args))


def questions(model: tj.models.Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out instructions with a short answer, as conversations."""
    short = []
    for row in rows("instructions.test"):
        asked = f"{row['instruction']}\n\n{row['input']}"
        if len(row["output"]) <= 12 and len(model.tokenizer.encode(asked)) < args.max_length - 32:
            turns = [("user", asked), ("assistant", row["output"])]
            messages = [{"role": role, "content": text} for role, text in turns]
            short.append({"task": row["task"], "messages": messages})
    return spread(short, args.questions)


def first_adapter(method: Peft, name: str, common: Setting, seed: int) -> Params:
    """The adapter before training; of a sparse one the entries with the largest gradient."""
    key, params = jax.random.key(seed), common.model.params
    if name != "sparse":
        return method.init(key, params)
    loss = losses.sft(tj.policy(common.model))
    grads = jax.jit(jax.grad(lambda p, batch: loss(p, batch)[0]))(params, common.batches[0])
    return method.init(key, params, jax.tree.map(jnp.abs, grads))


def loss_of(method: Peft, model: tj.models.Model) -> Loss:
    """Cross-entropy, and the method's own term where it has one."""
    actor = tj.policy(model, method)
    own = [losses.adapter_penalty(actor)] if method.penalty is not None else []
    return sum([losses.sft(actor), *own])  # type: ignore[return-value]


def optimizer(method: Peft, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW as the recipes chain it, with the method's own part."""
    schedule = tj.optim.warmup_cosine(learning_rate, steps, 0.1)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    return chain if method.transform is None else method.transform(steps, chain)


def held_out(method: Peft, common: Setting, adapter: Params) -> dict[str, float]:
    """Losses on instructions, and on dialogues that nobody trained on."""
    loss = losses.sft(tj.policy(common.model, method))
    return {
        name: train.evaluator(loss, lambda batches=batches: iter(batches))(adapter)["eval_loss"]
        for name, batches in (("test", common.test), ("dialogues", common.dialogues))
    }


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one method, or measures the base."""
    common = setting(args)
    if name == "before":
        method = tj.peft.lora(rank=1)
        adapter = method.init(jax.random.key(0), common.model.params)
        tuned = common.model
        found: dict[str, Any] = {"trainable": 0, "bytes": 0, "step_seconds": 0.0}
    else:
        method = METHODS[name].method()
        adapter, seconds = trained(name, method, common, args)
        tuned = common.model.with_params(method.attach(common.model.params, adapter))
        found = {"trainable": tree.count(tree.trainable(adapter)), "step_seconds": seconds}
        found["bytes"] = tree.num_bytes(adapter)
    found["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found |= held_out(method, common, adapter)
    right = exact_match(tuned, common.questions, max_new_tokens=8, batch_size=16)
    return {"method": name, **found, "exact_match": right.score}


def trained(
    name: str, method: Peft, common: Setting, args: argparse.Namespace
) -> tuple[Params, float]:
    """The adapter after all batches, and the median time of a step."""
    tx = optimizer(method, METHODS[name].learning_rate, len(common.batches))
    state = train.init(first_adapter(method, name, common, args.seed), tx, args.seed)
    step, loss = train.make_step(tx), loss_of(method, common.model)
    times = []
    for batch in common.batches:
        start = time.perf_counter()
        state, metrics = step(state, loss, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    if not np.isfinite(float(metrics["loss"])):
        raise ValueError(f"{name} diverged")
    return state.params, float(np.median(times[1:]))


def table(results: list[dict[str, Any]]) -> str:
    """A line a method."""
    heads = ["trainable", "adapter, MB", "test loss", "exact match, %", "dialogues"]
    heads += ["step, s", "peak, GB"]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for result in results:
        cells = [
            f"{result['trainable']:,}",
            f"{result['bytes'] / 1e6:.2f}",
            f"{result['test']:.3f}",
            f"{100 * result['exact_match']:.0f}",
            f"{result['dialogues']:.3f}",
            f"{result['step_seconds']:.2f}",
            f"{result['peak_gigabytes']:.2f}",
        ]
        lines.append(f"| {result['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A line a method, best first: losses on both kinds of text, and what trains.

    A method that is worse than the base by half a nat is drawn at the edge, with its loss beside it.
    """
    from matplotlib.figure import Figure

    base, *rest = results
    rest.sort(key=lambda r: r["test"])
    figure = Figure((10.0, 5.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, 3, sharey=True)
    titles = {
        "test": "instructions, held out (nats)",
        "dialogues": "dialogues, not trained on (nats)",
    }
    for axes, (kind, title) in zip(panels, titles.items(), strict=False):
        edge = base[kind] + 0.5
        for place, r in enumerate(rest):
            axes.plot(min(r[kind], edge), place, "o", color="C0")
            if r[kind] > edge:
                axes.annotate(
                    f"{r[kind]:.1f} →", (edge, place), (-36, -3), textcoords="offset points"
                )
        axes.axvline(base[kind], color="0.6", linewidth=1)
        axes.set(xlabel=title)
    panels[2].plot([r["trainable"] for r in rest], range(len(rest)), "o", color="C1")
    panels[2].set(xscale="log", xlabel="numbers that train")
    panels[0].set_yticks(range(len(rest)), [r["method"] for r in rest])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(color="0.94")
        axes.set_axisbelow(True)
    figure.suptitle("Lines: the base before training", fontsize=9)
    figure.savefig(path)


def arguments() -> argparse.Namespace:
    """The settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/peft_methods"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=96, help="rows of each kind")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="these methods instead of all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs every method that is not done yet, each in a process of its own, and prints the table."""
    args = arguments()
    if not DATA.exists():
        sys.exit(f"the rows are not at {DATA}")
    if args.one:
        print(json.dumps(run(args.one, args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in ("before", *METHODS):
        if name in {r["method"] for r in results} or (args.only and name not in args.only):
            continue
        command = [sys.executable, *sys.argv, "--one", name]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(child.stdout.splitlines()[-1]))
        with file.open("a") as out:
            print(json.dumps(results[-1]), file=out)
        print(table(results[-1:]).splitlines()[-1], flush=True)
    (args.out / "table.md").write_text(table(results))
    plot(results, args.out / "peft_methods.png")


if __name__ == "__main__":
    main()
