"""One reward model against an ensemble of four, trained at once on pairs of which a quarter is flipped.

    trainjax fetch smollm2-135m-instruct
    python experiments/reward_model/run.py --out runs/reward_model

Reads ../shared/data/preferences.{train,test}.jsonl.gz, writes scores.npz, results.json and
calibration.png to the folder.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import trainjax as tj
from trainjax import data, evals, losses
from trainjax.losses import reward
from trainjax.nn import remat

DATA = Path(__file__).resolve().parents[3] / "shared/data"
MODEL = "smollm2-135m-instruct"
SOURCES = (  # where this model's states tell right from wrong at all; see the README
    *("goal_step_wikihow/step_inference", "goal_step_wikihow/goal_inference", "riddle_sense"),
    *("fantasy_reasoning", "simple_ethical_questions", "general_knowledge"),
)
LORA = tj.peft.lora(rank=8, alpha=16)


def short_rows(split: str, longest: int) -> list[dict]:
    """Pairs of at most so many characters, questions with both answers."""
    rows = data.read(DATA / f"preferences.{split}.jsonl.gz")
    size = lambda row: sum(len(row[k]) for k in ("prompt", "chosen", "rejected"))  # noqa: E731
    return [row for row in rows if size(row) <= longest and row["source"] in SOURCES]


def flipped(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The rows, of a share the wrong answer called the right one."""
    wrong = np.random.default_rng(seed).random(len(rows)) < share
    swap = {"chosen": "rejected", "rejected": "chosen"}
    return [
        {swap.get(k, k): v for k, v in row.items()} if is_wrong else row
        for row, is_wrong in zip(rows, wrong, strict=True)
    ]


def encoded(model: tj.models.Model, rows: list[dict]) -> data.Examples:
    """Questions and answers as plain text: the chat template's own words would be half of the tokens."""
    asked = [row | {"prompt": f"Question: {row['prompt']}\nAnswer: "} for row in rows]
    return data.encode_groups(asked, model.tokenizer, 256, template=False)


def train(model: tj.models.Model, rows: list[dict], args: argparse.Namespace):
    """The params of all members, trained in one program."""
    keys = jax.random.split(jax.random.key(args.seed), args.members)
    params = jax.vmap(lambda key: tj.init_scorer(key, model, LORA))(keys)
    loss = losses.ensemble(losses.bradley_terry(tj.scorer(model, LORA), 0.01))
    plan = data.Plan(args.batch_size, 256, seed=args.seed)
    batches = data.Loader(encoded(model, rows), plan)
    tx = optax.adamw(tj.optim.warmup_cosine(args.learning_rate, steps=args.steps, warmup=3))
    state, step = tj.train.init(params, tx), tj.train.make_step(tx, accumulate=args.batch_size // 2)
    for number in range(1, args.steps + 1):
        state, metrics = step(state, loss, next(batches))
        if number % 5 == 0:
            each, right = float(metrics["loss"]) / args.members, float(metrics["accuracy"])
            print(f"step {number}: loss {each:.4f}, accuracy {right:.3f}", flush=True)
    return state.params


def scores_of(model: tj.models.Model, params, rows: list[dict]) -> np.ndarray:
    """`[members, pairs, 2]`."""
    examples = encoded(model, rows)
    plan, scorer = data.Plan(4, 256), tj.scorer(model, LORA)
    members = len(params["score"]["kernel"])
    own = [jax.tree.map(lambda x, k=k: x[k], params) for k in range(members)]
    return np.stack([evals.scores(scorer, member, examples, plan) for member in own])


def judged(scores: np.ndarray, penalty: float) -> dict[str, evals.Comparisons]:
    """Each member alone, and the ensemble's three ways to one score."""
    ways = {f"member {k + 1}": own for k, own in enumerate(scores)}
    ways["mean"] = scores.mean(0)
    ways["worst case (WCO)"] = np.asarray(reward.worst_case(scores))
    ways["mean - variance (UWO)"] = np.asarray(reward.uncertainty_penalised(scores, penalty))
    return {name: evals.comparisons(s[:, 0], s[:, 1]) for name, s in ways.items()}


def plot(out: Path, scores: np.ndarray) -> None:
    """How often the likelier completion was the better, by its chance; and in what pairs."""
    figure = Figure((8, 3.4), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    margins = scores[..., 0] - scores[..., 1]
    left.plot([0.5, 1], [0.5, 1], color="0.7", lw=1, label="calibrated")
    for name, m, color in (
        ("a member alone (4 pooled)", margins.ravel(), "C1"),
        ("mean of 4", margins.mean(0), "C0"),
    ):
        chance, came = 1 / (1 + np.exp(-np.abs(m))), m > 0
        parts = np.array_split(np.argsort(chance), 6)
        left.plot(
            [chance[p].mean() for p in parts],
            [came[p].mean() for p in parts],
            "o-",
            color=color,
            label=name,
        )
    left.set(xlabel="chance given to the likelier answer", ylabel="how often it was right")
    left.legend(frameon=False)
    orders = {
        "the mean's margin, largest first": -np.abs(margins.mean(0)),
        "the members' spread, least first": margins.std(0, ddof=1),
    }
    for place, (name, key) in enumerate(orders.items()):
        parts = np.array_split(np.argsort(key), 4)
        rates = np.array([(margins.mean(0)[part] > 0).mean() for part in parts])
        errors = 1.96 * np.sqrt(rates * (1 - rates) / [len(part) for part in parts])
        at = np.arange(4) + 0.4 * place - 0.2
        right.bar(at, rates, 0.4, yerr=errors, color=f"C{2 * place}", ecolor="0.4", label=name)
    right.axhline(0.5, color="0.7", lw=1)
    right.set(
        xticks=range(4),
        xticklabels=["first", "second", "third", "last"],
        xlabel="quarter of the pairs, in order of",
        ylabel="accuracy of the mean",
        ylim=(0, 1.3),
    )
    right.legend(frameon=False)
    figure.savefig(out / "calibration.png")


def main() -> None:
    """Runs the experiment and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/reward_model"))
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=360)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--longest", type=int, default=380)
    parser.add_argument("--flipped", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--penalty", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"skipped: this experiment reads {DATA}, which is not on this machine")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = short_rows("train", args.longest)
    rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))]
    kept, test = rows[: args.pairs], short_rows("test", args.longest) + rows[args.pairs :]
    test = test[: args.held_out]
    rows = flipped(kept, args.flipped, args.seed)
    print(f"{len(rows)} pairs to train on, {len(test)} held out", flush=True)
    model = tj.load(MODEL, remat=remat.projections)
    start = time.perf_counter()
    params = train(model, rows, args)
    trained = time.perf_counter()
    scores = scores_of(model, params, test)
    seconds = {"training": trained - start, "scoring": time.perf_counter() - trained}
    np.savez(args.out / "scores.npz", scores=scores)
    found = judged(scores, args.penalty)
    results = {name: value._asdict() for name, value in found.items()}
    about = {"settings": vars(args) | {"out": str(args.out)}, "seconds": seconds}
    (args.out / "results.json").write_text(json.dumps(about | {"results": results}, indent=2))
    plot(args.out, scores)
    print("| score | accuracy | margin | ECE | Brier |\n|---|---|---|---|---|")
    for name, c in found.items():
        print(
            f"| {name} | {c.accuracy:.3f} | {c.margin:.3f} | {c.calibration_error:.3f} | {c.brier:.3f} |"
        )
    print({name: round(value) for name, value in seconds.items()})


if __name__ == "__main__":
    main()
