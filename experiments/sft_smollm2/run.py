"""LoRA on SmolLM2-135M-Instruct: 50 tasks of natural instructions, held-out loss before, during and after.

    trainjax fetch smollm2-135m-instruct
    python experiments/sft_smollm2/run.py --out runs/sft_smollm2

Reads ../shared/data/instructions.{train,test}.jsonl.gz, writes a run's folder and loss.png in it.
"""

import argparse
import gzip
import json
from pathlib import Path

from matplotlib.figure import Figure

from trainjax import data, losses, models, train
from trainjax.policies import policy
from trainjax.recipes import sft

DATA = Path(__file__).resolve().parents[3] / "shared/data"
MODEL = "smollm2-135m-instruct"


def held_out(path: Path, count: int) -> None:
    """Every so-and-so-manyth row of the test split, so that all tasks are in it."""
    with gzip.open(DATA / "instructions.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = lines.read().splitlines()
    path.write_text("\n".join(rows[:: len(rows) // count][:count]) + "\n", encoding="utf-8")


def before(test: Path, batch_size: int, max_length: int) -> float:
    """The base model's loss on the held-out rows."""
    model = models.load(MODEL)
    examples = data.encode(data.read(test), model.tokenizer, max_length)
    plan = data.Plan(batch_size, max_length)
    loss = losses.sft(policy(model))
    return train.evaluator(loss, lambda: data.one_epoch(examples, plan))(model.params)["eval_loss"]


def plot(out: Path, first: float) -> list[tuple[int, float]]:
    """The two curves; returns the held-out one."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    tokens = {record["step"]: record["num_tokens"] for record in steps}
    evals = [(0, first), *((r["step"], r["eval_loss"]) for r in records if "eval_loss" in r)]
    figure = Figure((6, 3.4), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.plot(
        [r["num_tokens"] / 1000 for r in steps],
        [r["loss"] for r in steps],
        color="0.7",
        label="training",
    )
    held = [tokens.get(step, 0) / 1000 for step, _ in evals]
    axes.plot(held, [loss for _, loss in evals], "o-", color="C0", label="held out")
    axes.set(xlabel="thousand tokens", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png")
    return evals


def main() -> None:
    """Runs the experiment and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sft_smollm2"))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    test = args.out.with_name(f"{args.out.name}-test.jsonl")
    held_out(test, args.held_out)
    first = before(test, 4, 512)
    print(f"before: {first:.4f}", flush=True)
    sft.main(
        sft.Config(
            model=MODEL,
            data=str(DATA / "instructions.train.jsonl.gz"),
            eval_data=str(test),
            out=args.out,
            steps=args.steps,
            batch_size=4,
            max_length=512,
            accumulate=4,
            learning_rate=5e-4,
            eval_every=args.steps // 4,
            seed=args.seed,
        )
    )
    for step, loss in plot(args.out, first):
        print(f"| {step} | {loss:.4f} |")


if __name__ == "__main__":
    main()
