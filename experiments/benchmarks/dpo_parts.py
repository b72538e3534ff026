"""What makes a DPO step fast: the same pairs with one thing after another, each in a process of its own.

    python experiments/benchmarks/dpo_parts.py --rows runs/benchmarks/pairs.jsonl

Prints a table in Markdown: pairs per second and peak resident set. From line to line one thing is added:
    full logits      each completion with a prompt of its own, one row a completion pair, `[rows, seq, vocab]`
    chunked          log-probabilities of the completions' tokens only, through the head in chunks
    shared prompt    the prompt's tokens once for both completions
    packed           several pairs a row of 512
    cached           the reference's log-probabilities computed beforehand
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import trainjax as tj
from trainjax import data, losses, policies
from trainjax.nn import head, remat
from trainjax.ops.head import logits as full_logits
from trainjax.ops.vocab import TokenStats
from trainjax.types import Batch, Params, pytree

PARTS = ("full logits", "chunked", "shared prompt", "packed", "cached")


@pytree
class FullLogits:
    """A policy that makes all logits, as most libraries do."""

    policy: policies.Policy

    def __call__(
        self, params: Params, batch: Batch, key: Any = None, where: Any = None
    ) -> TokenStats:
        hidden = self.policy.hidden(params, batch, key)
        weights = self.policy.attached(params, key)
        logits = full_logits(hidden, head(self.policy.module.config, weights))
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        targets = batch["tokens"][:, 1:, None]
        chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[..., 0]
        chosen = jnp.where(where, jnp.pad(chosen, ((0, 0), (1, 0))), 0.0)
        return TokenStats(chosen, jnp.zeros_like(chosen), jnp.zeros_like(chosen))


@pytree
class FullReference:
    """The base alone, with all logits."""

    policy: FullLogits

    def __call__(self, batch: Batch, where: Any = None) -> TokenStats:
        return jax.lax.stop_gradient(self.policy(None, batch, where=where))


def measure(parts: list[str], rows: Path, count: int) -> dict[str, Any]:
    """All pairs over all seconds of an epoch, after a first one in which the programs are compiled."""
    model = tj.load("smollm2-135m-instruct", remat=remat.projections)
    method = tj.peft.lora(rank=16, alpha=32)
    ours, reference = tj.policy(model, method), tj.reference(model)
    if "chunked" not in parts:
        ours, reference = FullLogits(ours), FullReference(FullLogits(reference.policy))
    examples = data.encode_groups(
        data.read(rows)[:count], model.tokenizer, 512, share_prompt="shared prompt" in parts
    )
    if "cached" in parts:
        examples = data.with_reference(examples, policies.reference_logprobs(reference))
        reference = policies.CachedReference()
    packed = "packed" in parts
    pack, batch_size = (data.best_fit, 2) if packed else (data.unpacked, 8)
    plan = data.Plan(batch_size, data.row_length(examples, 512), pack)
    steps = len(plan.epoch(examples, 0))
    loader = data.Loader(examples, plan)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(5e-5, weight_decay=0.0))
    state = tj.train.init(method.init(jax.random.key(0), model.params), tx)
    step = tj.train.make_step(tx, accumulate=2)
    loss = losses.dpo(ours, reference)
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, loss, next(loader))
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"pairs_per_second": len(examples) / seconds, "peak_memory_bytes": peak}


def main() -> None:
    """Measures every line in a process of its own; with `--part` one line, here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="pairs.jsonl of compare.py")
    parser.add_argument("--count", type=int, default=64, help="pairs")
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    if args.part:
        parts = list(PARTS[: PARTS.index(args.part) + 1])
        print(json.dumps(measure(parts, args.rows, args.count)))
        return
    print("| with | pairs/s | peak, GB |\n|---|---|---|")
    for part in PARTS:
        command = [sys.executable, __file__, "--rows", args.rows, "--part", part]
        done = subprocess.run(
            [*command, "--count", str(args.count)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        rate, peak = found["pairs_per_second"], found["peak_memory_bytes"] / 1e9
        print(f"| {part} | {rate:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
