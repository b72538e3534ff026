"""Which optimizer reaches a loss first: a small decoder from scratch, and LoRA on SmolLM2-135M-Instruct.

    python experiments/optimizers/run.py scratch --out runs/optimizers
    trainjax fetch smollm2-135m-instruct
    python experiments/optimizers/run.py lora --out runs/optimizers

In the manner of AlgoPerf: every optimizer has the same number of steps, batches and trials of its learning
rate (others of its settings stay at their defaults), and is then run with the best of them from other seeds.
The target is the held-out loss that AdamW has after nine tenths of its steps, in the mean over seeds; the
time to target is the first evaluation at which the mean curve is no higher, in steps and in seconds of
steps measured apart. The schedule is warm-up, then a line to zero at the last step; schedule_free stays up.

Reads ../shared/data/{instructions,dialogues}.{train,test}.jsonl.gz. Appends a line to OUT/WORKLOAD.jsonl as
soon as a run is done and skips those that are there; writes OUT/WORKLOAD.md and OUT/WORKLOAD.png.
"""

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import trainjax as tj
from trainjax import data, losses, optim, train, tree
from trainjax.recipes._optim import OPTIMIZERS
from trainjax.types import Batch, Loss, Params

DATA = Path(__file__).resolve().parents[3] / "shared/data"
NAMES = (*("adamw", "adamw_8bit", "lion", "sophia_g", "sophia_h", "muon", "schedule_free", "fira"),)
TRIALS = {  # learning rates of the first workload; of LoRA see `Workload.factor`
    "adamw": (1e-3, 3e-3, 1e-2),
    "adamw_8bit": (1e-3, 3e-3, 1e-2),
    "lion": (1e-4, 3e-4, 1e-3),
    "sophia_g": (1e-3, 3e-3, 1e-2),
    "sophia_h": (1e-3, 3e-3, 1e-2),
    "muon": (3e-3, 1e-2, 3e-2),
    "schedule_free": (3e-3, 1e-2, 3e-2),
    "fira": (3e-3, 1e-2, 3e-2),
}
SETTINGS: dict[str, dict[str, Any]] = {"fira": {"rank": 32, "every": 50}}
SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        loss, curvature: of the params, on a batch.
        first: `(seed) -> params`.
        batches: `(seed) -> batches`, without end.
        evaluate: the held-out loss of params.
        steps, every: of a run, and between evaluations.
        factor: for the learning rates of TRIALS.
    """

    loss: Loss
    curvature: Loss
    first: Callable[[int], Params]
    batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[Params], float]
    steps: int
    every: int
    factor: float


def text(name: str) -> bytes:
    """Everything that is said in a split, one after another."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return "\n".join(said for line in lines for said in _said(json.loads(line))).encode()


def _said(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [
        value for key, value in row.items() if isinstance(value, str) and key not in ("task", "id")
    ]


def scratch(args: argparse.Namespace) -> Workload:
    """A decoder of 0.9 million numbers on bytes, 16 rows of 128."""
    rows, seq = 16, 128
    model = tj.models.random_model(SMALL, jax.random.key(0))
    policy = tj.policy(model)
    train_text = np.frombuffer(text("instructions.train") + text("dialogues.train"), np.uint8)
    held_out = np.frombuffer(text("dialogues.test") + text("instructions.test"), np.uint8)

    def batch(source: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.stack([source[start : start + seq] for start in starts]).astype(np.int32)
        weights = np.full(tokens.shape, 1 / (len(starts) * (seq - 1)), np.float32)
        weights[:, 0] = 0
        return {"tokens": tokens, "weights": weights}

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            yield batch(train_text, rng.integers(0, len(train_text) - seq, rows))

    fixed = [
        batch(held_out, np.arange(n, n + 64) * (len(held_out) // 257)) for n in (0, 64, 128, 192)
    ]
    loss = losses.sft(policy)
    value = jax.jit(lambda loss, params, batch: loss(params, batch)[0])

    def evaluate(params: Params) -> float:
        return float(np.mean([value(loss, params, batch) for batch in fixed]))

    def first(seed: int) -> Params:
        return tj.models.random_model(SMALL, jax.random.key(seed)).params

    drawn = losses.drawn(policy)
    return Workload(loss, drawn, first, batches, evaluate, args.steps or 400, 10, 1.0)


def lora(args: argparse.Namespace) -> Workload:
    """LoRA of rank 16 on SmolLM2-135M-Instruct in bfloat16, four rows of up to 192 tokens."""
    model = tj.load("smollm2-135m-instruct", dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    method = tj.peft.lora()
    policy = tj.policy(model, method)

    def examples(split: str, every: int = 1) -> Any:
        with gzip.open(DATA / f"instructions.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][::every]
        return data.encode(rows, model.tokenizer, 192)

    known, held_out = examples("train"), examples("test", 16)
    loss = losses.sft(policy)
    told = train.evaluator(loss, lambda: data.one_epoch(held_out, data.Plan(8, 192)))
    return Workload(
        loss,
        losses.drawn(policy),
        lambda seed: method.init(jax.random.key(seed), model.params),
        lambda seed: iter(data.Loader(known, data.Plan(4, 192, seed=seed))),
        lambda params: told(params)["eval_loss"],
        args.steps or 60,
        6,
        args.factor,
    )


def optimizer(name: str, rate: float, steps: int) -> Any:
    """Its chain; decay is 0.1 and clipping 1 for all."""
    warmup = steps // 20
    form = optim.constant if name == "schedule_free" else optim.linear
    settings = optim.Chain(
        optimizer=OPTIMIZERS[name],
        learning_rate=form(rate, steps, warmup),
        weight_decay=0.1,
        settings=SETTINGS.get(name, {}),
    )
    return optim.chain(settings)


def run(work: Workload, name: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: the held-out loss every so many steps, and the time of a step."""
    tx = optimizer(name, rate, work.steps)
    state, step = train.init(work.first(seed), tx, seed), train.make_step(tx)
    extra = {"curvature": work.curvature} if name == "sophia_g" else {}
    batches, curve, times = work.batches(seed), [], []
    for number in range(1, work.steps + 1):
        batch = next(batches)
        start = time.perf_counter()
        state, metrics = step(state, work.loss, batch, **extra)
        if not bool(metrics["is_finite"]):
            break
        times.append(time.perf_counter() - start)
        if number % work.every == 0:
            trained = optim.eval_params(state.opt_state, tree.trainable(state.params))
            curve.append(work.evaluate(tree.with_trained(state.params, trained)))
    seconds = (
        statistics.mean(sorted(times[2:])[: -max(1, len(times) // 50)]) if len(times) > 5 else 0
    )
    found = {"name": name, "rate": rate, "seed": seed, "curve": curve, "seconds": seconds}
    return found | {"bytes": tree.num_bytes(state.opt_state)}


def all_runs(work: Workload, file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trials of the rate from one seed, then the best rate from the others; done ones are read."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def once(name: str, rate: float, seed: int) -> dict[str, Any]:
        for old in done:
            if (old["name"], old["rate"], old["seed"]) == (name, rate, seed):
                return old
        found = run(work, name, rate, seed)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        last = found["curve"][-1] if found["curve"] else float("nan")
        print(f"{name:14} {rate:.1e} seed {seed}: {last:.4f}, {found['seconds']:.3f} s", flush=True)
        return found

    runs = []
    for name in args.only or NAMES:
        trials = [once(name, rate * work.factor, 0) for rate in TRIALS[name]]
        whole = [t for t in trials if len(t["curve"]) == work.steps // work.every] or trials
        best = min(whole, key=lambda trial: trial["curve"][-1])
        runs += [best, *(once(name, best["rate"], seed) for seed in range(1, args.seeds))]
    return runs


def report(work: Workload, runs: list[dict[str, Any]], out: Path, workload: str) -> None:
    """The table and the curves."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(found["name"] for found in runs))
    of = {name: [found for found in runs if found["name"] == name] for name in names}
    mean = {name: np.mean([found["curve"] for found in of[name]], axis=0) for name in names}
    spread = {name: np.std([found["curve"][-1] for found in of[name]], ddof=1) for name in names}
    seconds = {name: statistics.median(found["seconds"] for found in of[name]) for name in names}
    target = mean["adamw"][int(0.9 * len(mean["adamw"])) - 1]
    first = {name: _first(mean[name], target, work.every) for name in names}
    table = f"Target: a held-out loss of {target:.4f}.\n\n"
    table += "| optimizer | rate | final loss | steps to target | of AdamW's | s a step | time, of AdamW's "
    table += "| state, MB |\n|---|---|---|---|---|---|---|---|\n"
    base = first["adamw"]
    for name in names:
        steps, ratio = first[name], seconds[name] / seconds["adamw"]
        reached = [str(steps), f"{steps / base:.2f}"] if steps else ["not reached", ""]
        cells = [name, f"{of[name][0]['rate']:.0e}", f"{mean[name][-1]:.4f} ± {spread[name]:.4f}"]
        cells += [*reached, f"{seconds[name]:.3f}"]
        cells += [f"{steps / base * ratio:.2f}" if steps else ""]
        cells += [f"{of[name][0]['bytes'] / 1e6:.1f}"]
        table += f"| {' | '.join(cells)} |\n"
    (out / f"{workload}.md").write_text(table)
    print(table)
    figure = Figure((6.8, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    for name in names:
        at = work.every * np.arange(1, len(mean[name]) + 1)
        axes.plot(at, mean[name], label=name, linewidth=1.2)
    axes.axhline(target, color="0.7", linewidth=0.8)
    axes.set(xlabel="step", ylabel="held-out loss, mean over seeds")
    low = min(curve[-1] for curve in mean.values())
    axes.set_ylim(low - 0.05 * (mean["adamw"][0] - low), mean["adamw"][len(mean["adamw"]) // 10])
    axes.legend(frameon=False)
    figure.savefig(out / f"{workload}.png")


def _first(curve: np.ndarray, target: float, every: int) -> int | None:
    below = np.nonzero(curve <= target)[0]
    return int(below[0] + 1) * every if len(below) else None


def main() -> None:
    """Runs what is not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workload", choices=("scratch", "lora"))
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factor", type=float, default=0.3, help="of the rates, for lora")
    parser.add_argument("--only", nargs="*", choices=NAMES)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the rows are not at {DATA}")
    args.out.mkdir(parents=True, exist_ok=True)
    work = {"scratch": scratch, "lora": lora}[args.workload](args)
    runs = all_runs(work, args.out / f"{args.workload}.jsonl", args)
    report(work, runs, args.out, args.workload)


if __name__ == "__main__":
    main()
