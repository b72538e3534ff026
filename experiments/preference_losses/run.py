"""The pair losses at equal budget: SmolLM2-135M-Instruct on right and wrong answers to one question.

    trainjax fetch smollm2-135m-instruct
    python experiments/preference_losses/run.py --out runs/preference_losses

Reads ../shared/data/preferences.{train,test}.jsonl.gz. Every loss trains the same adapter on the same
batches in the same order with the same optimizer; then all are judged on the same held-out pairs and on
samples for the same prompts. Appends a line to OUT/results.jsonl as soon as a loss is done, skips those
that are there (so an interrupted run goes on), and writes OUT/preference_losses.png.
"""

import argparse
import gzip
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainjax as tj
from trainjax import data, losses, policies, rollout
from trainjax.losses import divergence
from trainjax.losses.pairs import pairs_of
from trainjax.losses.preference import LOSSES, WITHOUT_REFERENCE
from trainjax.types import Batch, Loss, Params

DATA = Path(__file__).resolve().parents[3] / "shared/data"
METHOD = tj.peft.lora(rank=16, alpha=32)
EXTRAS: dict[str, Callable[[Any, Any], Loss]] = {
    "dpo + sft": lambda p, r: losses.dpo(p, r) + losses.sft(p),
    "dpo, ld_alpha 0.5": lambda p, r: losses.pairwise(p, r, ld_alpha=0.5),
    "dpo, wpo": lambda p, r: losses.pairwise(p, r, wpo=True),
}


class Setting(NamedTuple):
    """What all losses have in common."""

    model: tj.models.Model
    policy: policies.Policy
    batches: list[Batch]
    held_out: list[Batch]
    num_held_out: int
    prompts: list[list[int]]
    learning_rate: float


def pairs(split: str) -> list[dict[str, Any]]:
    """The rows of a split as one-turn conversations."""
    with gzip.open(DATA / f"preferences.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows
    ]


def setting(args: argparse.Namespace) -> Setting:
    """Reads model and data; the reference's log-probabilities are computed here, once for all."""
    model = tj.load("smollm2-135m-instruct")
    logprobs = policies.reference_logprobs(tj.reference(model))

    def encoded(split: str, count: int) -> data.Examples:
        rows = pairs(split)[:count]
        examples = data.encode_groups(rows, model.tokenizer, args.max_length, too_long=data.drop)
        return data.with_reference(examples, logprobs, batch_size=16)

    # 1.5 times as many rows as pairs are needed: some are longer than max_length.
    train = encoded("train", int(1.5 * args.steps * args.batch_size))
    test = encoded("test", args.held_out)
    plan = data.Plan(args.batch_size, data.row_length(train, args.max_length), data.unpacked)
    whole = data.Plan(16, data.row_length(test, args.max_length), data.unpacked)
    prompts = [rollout.prompt_ids(model.tokenizer, row["prompt"]) for row in pairs("test")]
    short = [prompt for prompt in prompts if len(prompt) <= args.max_length]
    return Setting(
        model,
        tj.policy(model, METHOD),
        list(itertools.islice(data.Loader(train, plan), args.steps)),
        list(data.one_epoch(test, whole)),
        len(test),
        short[:: len(short) // args.samples][: args.samples],
        args.learning_rate,
    )


def trained(setting: Setting, loss: Loss, seed: int) -> tuple[Params, list[float]]:
    """The adapter after all batches, and the loss of each step."""
    schedule = tj.optim.warmup_cosine(setting.learning_rate, len(setting.batches), 0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    adapter = METHOD.init(jax.random.key(seed), setting.model.params)
    state, step = tj.train.init(adapter, tx, seed), tj.train.make_step(tx, accumulate=2)
    values = []
    for batch in setting.batches:
        state, metrics = step(state, loss, batch)
        values.append(metrics["loss"])
    return state.params, [float(value) for value in values]


@jax.jit
def judged(policy: policies.Policy, adapter: Params, batch: Batch) -> dict[str, jax.Array]:
    """Weighted sums over the pairs of a held-out batch."""
    where = batch["completions"] > 0
    logprobs = policy(adapter, batch, where=where).logprobs
    found = pairs_of(logprobs, batch["reference_logprobs"], batch)
    per_token = found.chosen / found.chosen_length - found.rejected / found.rejected_length
    each = {
        "accuracy": found.c > found.r,
        "margin": found.c - found.r,
        "chosen": found.c,
        "rejected": found.r,
        "likelier": found.chosen > found.rejected,
        "likelier_per_token": per_token > 0,
    }
    return {name: jnp.sum(found.weights * value) for name, value in each.items()}


def held_out(setting: Setting, adapter: Params) -> dict[str, float]:
    """Held-out pairs: how often the implied reward is right, and by how much (in nats, beta = 1)."""
    parts = [judged(setting.policy, adapter, batch) for batch in setting.held_out]
    return {name: float(sum(part[name] for part in parts)) for name in parts[0]}


def sampled(setting: Setting, adapter: Params, seed: int) -> dict[str, float]:
    """Figures of samples at temperature 1: mean length, and KL to the reference, per answer, from them."""
    model = setting.model
    tuned = model.with_params(METHOD.attach(model.params, adapter))
    answers = rollout.generate(
        tuned,
        setting.prompts,
        max_new_tokens=64,
        sampler=rollout.sampler(1.0),
        key=jax.random.key(seed),
        batch_size=16,
    )
    kl = [_kl(setting, adapter, rows) for rows in _rows(setting.prompts, answers)]
    lengths = [len(answer.tokens) for answer in answers]
    return {"length": float(np.mean(lengths)), "kl": float(np.sum(kl) / len(lengths))}


def _rows(prompts: list[list[int]], answers: Any) -> Iterator[Batch]:
    """Prompts with their answers, 16 a batch, all of one shape."""
    length = -(-max(map(len, prompts)) // 64) * 64 + 64
    for start in range(0, len(prompts), 16):
        tokens = np.zeros((16, length), np.int32)
        where = np.zeros((16, length), bool)
        some = zip(prompts[start : start + 16], answers[start : start + 16], strict=True)
        for row, (prompt, answer) in enumerate(some):
            ids = [*prompt, *answer.tokens]
            tokens[row, : len(ids)], where[row, len(prompt) : len(ids)] = ids, True
        yield {"tokens": jnp.asarray(tokens), "where": jnp.asarray(where)}


def _kl(setting: Setting, adapter: Params, rows: Batch) -> float:
    return float(_kl_sum(setting.policy, tj.reference(setting.model), adapter, rows))


@jax.jit
def _kl_sum(policy: Any, reference: Any, adapter: Params, rows: Batch) -> jax.Array:
    """The sum over sampled tokens of k3, an estimate of the KL that is never negative."""
    where = rows["where"]
    ours = policy(adapter, rows, where=where).logprobs
    theirs = reference(rows, where=where).logprobs
    return jnp.sum(jnp.where(where, divergence.k3(ours, theirs), 0.0))


def loss_named(name: str, setting: Setting) -> Loss:
    """A loss of the table, with its own defaults."""
    cached = policies.CachedReference()
    if name in EXTRAS:
        return EXTRAS[name](setting.policy, cached)
    chosen = LOSSES[name]
    return losses.pairwise(setting.policy, None if chosen in WITHOUT_REFERENCE else cached, chosen)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """What each loss reaches, with one standard error, beside what it costs in KL."""
    from matplotlib.figure import Figure

    base, *rest = results
    rest.sort(key=lambda result: result["likelier"])
    figure = Figure((7.5, 5.0), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    percent = [100 * result["likelier"] for result in rest]
    error = [(p * (100 - p) / base["pairs"]) ** 0.5 for p in percent]
    left.errorbar(percent, range(len(rest)), xerr=error, fmt="o", color="C0", ecolor="0.8")
    left.axvline(100 * base["likelier"], color="0.6", linewidth=1)
    left.text(100 * base["likelier"] + 0.3, len(rest) - 0.3, "before", color="0.4", va="center")
    left.set_ylim(-0.7, len(rest) + 0.2)
    left.set_yticks(range(len(rest)), [result["loss"] for result in rest])
    left.set_xlabel("held-out pairs whose right answer\nis the likelier one, %")
    right.plot([result["kl"] for result in rest], range(len(rest)), "o", color="C1")
    right.set(xscale="log", xlabel="KL to the reference\n(nats per sampled answer)")
    for axes in (left, right):
        axes.grid(axis="y", color="0.95")
        axes.set_axisbelow(True)
    figure.savefig(path)


def main() -> None:
    """Trains and judges every loss that is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/preference_losses"))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=256, help="rows of the test split")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the pairs are not at {DATA}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {result["loss"] for result in results}
    common = setting(args)
    with file.open("a") as out:
        for name in ("before", *LOSSES, *EXTRAS):
            if name in done or name == "dno":  # which needs scores, and these pairs have none
                continue
            start, values = time.perf_counter(), []
            adapter = METHOD.init(jax.random.key(args.seed), common.model.params)
            if name != "before":
                adapter, values = trained(common, loss_named(name, common), args.seed)
            result = {"loss": name, **held_out(common, adapter), **sampled(common, adapter, 1)}
            result |= {"pairs": common.num_held_out, "seconds": time.perf_counter() - start}
            result |= {"losses": values}
            results.append(result)
            print(json.dumps(result), file=out, flush=True)
            print(row(result), flush=True)
    plot(results, args.out / "preference_losses.png")


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [
        result["loss"],
        f"{100 * result['accuracy']:.1f}",
        f"{result['margin']:.2f}",
        f"{result['chosen']:.2f}",
        f"{result['rejected']:.2f}",
        f"{100 * result['likelier']:.1f}",
        f"{100 * result['likelier_per_token']:.1f}",
        f"{result['length']:.1f}",
        f"{result['kl']:.2f}",
        f"{result['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
