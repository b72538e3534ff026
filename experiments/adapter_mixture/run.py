"""Three tasks and one base: one adapter for all, experts with a router, or an adapter a task.

    trainjax fetch smollm2-135m-instruct
    python experiments/adapter_mixture/run.py --out runs/adapter_mixture

Trains on SmolLM2-135M-Instruct, at about equal numbers of trained parameters and equal rows: a LoRA on the
mixture of the tasks; MoLoRA on the mixture, with and without its balance loss; a LoRA of each task. The
three are then used in several ways without training: each row through its task's own (`peft.switched`),
all at once by weight (`peft.together`), and merged into one by singular values. Every line answers the same
held-out questions. Skips lines that are done; writes OUT/table.md and OUT/adapter_mixture.png.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import trainjax as tj
from trainjax import data, losses, merging, rollout, tree
from trainjax.data import tasks
from trainjax.peft.combined import together
from trainjax.peft.switched import stacked
from trainjax.types import Params, Peft

TASKS = ("convert_units", "reverse_words", "sort_numbers")
ONE_EACH, ALL = tj.peft.lora(rank=8, alpha=16.0), tj.peft.lora(rank=24, alpha=48.0)
MIXTURES = {
    "MoLoRA, 3 experts": tj.peft.molora(rank=8, alpha=16.0, experts=3),
    "MoLoRA, 3 experts, no balance": tj.peft.molora(rank=8, alpha=16.0, experts=3, balance=0.0),
    "MoLoRA, 3 experts, top 1": tj.peft.molora(rank=8, alpha=16.0, experts=3, top_k=1),
}


def rows(names: tuple[str, ...], count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of the tasks, in turn."""
    return tasks.rows(count, seed, tasks={name: tasks.TASKS[name] for name in names})


def trained(
    model: tj.models.Model, method: Peft, names: tuple[str, ...], args: argparse.Namespace
) -> tuple[Params, dict[str, float]]:
    """The adapter after its share of the steps, and the last metrics of its router."""
    steps = args.steps * len(names) // len(TASKS)
    examples = data.encode(rows(names, 128 * len(names), args.seed), model.tokenizer, 96)
    batches = itertools.islice(data.Loader(examples, data.Plan(args.batch_size, 96)), steps)
    policy = tj.policy(model, method)
    loss = losses.sft(policy)
    if method.penalty is not None:
        loss += losses.adapter_penalty(policy)
    schedule = tj.optim.warmup_cosine(1e-3, steps, 0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    state = tj.train.init(method.init(jax.random.key(args.seed), model.params), tx)
    step, metrics = tj.train.make_step(tx), {}
    for batch in batches:
        state, metrics = step(state, loss, batch)
    told = ("loss", "balance", "max_load")
    return state.params, {name: float(metrics[name]) for name in told if name in metrics}


def asked(model: tj.models.Model, questions: list[Any], **how: Any) -> dict[str, float]:
    """The share of right answers on each task."""
    prompts = [rollout.prompt_ids(model.tokenizer, row["messages"][:-1]) for row in questions]
    answers = rollout.generate(model, prompts, max_new_tokens=24, **how)
    right: dict[str, list[bool]] = {name: [] for name in TASKS}
    for row, answer in zip(questions, answers, strict=True):
        right[row["task"]].append(answer.text.strip() == row["messages"][-1]["content"])
    return {name: sum(found) / len(found) for name, found in right.items()}


def measure(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every line that is not done yet."""
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    model = tj.load("smollm2-135m-instruct", dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    questions = rows(TASKS, 3 * args.questions, 1000 + args.seed)

    def done(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        file.write_text(json.dumps(results, indent=1))
        print(name, found, flush=True)

    def attached(method: Peft, adapter: Params) -> tj.models.Model:
        return model.with_params(method.attach(model.params, adapter))

    if "base" not in results:
        done("base", {"scores": asked(model, questions)})
    for name, method in {"one LoRA": ALL, **MIXTURES}.items():
        if name not in results:
            adapter, metrics = trained(model, method, TASKS, args)
            scores = asked(attached(method, adapter), questions)
            done(name, {"scores": scores, "size": tree.count(adapter), **metrics})
    after = ("a LoRA a task, switched", "a LoRA a task, summed", "a LoRA a task, a third each")
    after += ("a LoRA a task, merged by SVD",)
    if all(name in results for name in after):
        return results
    each = {}
    for name in TASKS:
        adapter, _ = trained(model, ONE_EACH, (name,), args)
        tj.save_adapter(args.out / name, model, ONE_EACH, adapter)
        each[name] = ONE_EACH, adapter
    size = 3 * tree.count(adapter)
    served = attached(*stacked(list(each.values()), model.params))
    own = [TASKS.index(row["task"]) for row in questions]
    done(after[0], {"scores": asked(served, questions, adapters=own), "size": size})
    for name, weight in zip(after[1:3], (1.0, 1 / 3), strict=True):
        both = attached(*together(each, dict.fromkeys(each, weight)))
        done(name, {"scores": asked(both, questions), "size": size})
    merged = args.out / "merged"
    if not merged.exists():
        merging.merge_adapters(merged, merging.adapters.svd(8), [args.out / t for t in TASKS])
    scores = asked(attached(*tj.load_adapter(merged, model)), questions)
    done(after[3], {"scores": scores, "size": size // 3})
    return results


def main() -> None:
    """Measures what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/adapter_mixture"))
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--questions", type=int, default=48, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = measure(args, args.out / "results.json")
    table = f"| line | trained numbers | {' | '.join(TASKS)} | mean | busiest expert |\n"
    table += f"|---|---|{'---|' * (len(TASKS) + 2)}\n"
    for name, found in results.items():
        scores = list(found["scores"].values())
        cells = [name, f"{found.get('size', 0):,}", *(f"{score:.0%}" for score in scores)]
        cells += [f"{sum(scores) / len(scores):.0%}"]
        cells += [f"{found['max_load']:.2f}" if "max_load" in found else ""]
        table += f"| {' | '.join(cells)} |\n"
    (args.out / "table.md").write_text(table)
    plot(results, args.out / "adapter_mixture.png")
    print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars by line, a colour for each task."""
    figure = Figure((8.0, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    for number, task in enumerate(TASKS):
        scores = [100 * found["scores"][task] for found in results.values()]
        places = [line + 0.25 * (number - 1) for line in range(len(results))]
        axes.barh(places, scores, 0.24, label=task)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="right answers, %", xlim=(0, 100))
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, 1.1))
    figure.savefig(path)


if __name__ == "__main__":
    main()
