"""Twelve adapters served in one batch, beside one adapter for all its rows.

    trainjax fetch smollm2-135m-instruct
    python experiments/benchmarks/adapters.py

SmolLM2-135M-Instruct, LoRA of rank 16 on all linear layers. `scoring` is the log-probabilities of 12 rows
of 128 tokens; `training` a step of AdamW on them; `serving` 12 prompts of 64 tokens with 32 tokens of
answer each. The sides alternate in one process: one adapter for all rows, each row its own of twelve, and
the base alone. Prints medians, and the ratio of twelve to one, as a table in Markdown.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainjax as tj
from trainjax import platform, tree
from trainjax.peft import lora
from trainjax.peft.switched import stacked

ROWS, SEQ, PROMPT, ANSWER = 12, 128, 64, 32


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, to the end of what it starts on the device."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


@platform.jit
def logprobs(policy: Any, params: Any, batch: Any) -> Any:
    """Log-probabilities of the batch's tokens."""
    return policy(params, batch).logprobs


def trainer(loss: Any, adapter: Any, batch: Any) -> Callable[[], Any]:
    """A training step, which goes on from where the last one was."""
    tx = optax.adamw(1e-5)
    step, state = tj.train.make_step(tx), [tj.train.init(adapter, tx)]

    def run() -> Any:
        state[0], metrics = step(state[0], loss, batch)
        return metrics

    return run


def sides(what: str, dtype: Any) -> dict[str, Callable[[], Any]]:
    """What to time, by name."""
    model = tj.load("smollm2-135m-instruct", dtype=dtype, compute_dtype=dtype)
    one = lora(rank=16)
    members = []
    for i in range(ROWS):
        first = one.init(jax.random.key(i), model.params)
        members.append((one, tree.map_named(functools.partial(_noise, i), first)))
    many, adapters = stacked(members, model.params)
    rng = np.random.default_rng(0)
    if what == "serving":
        prompts = rng.integers(100, 40000, (ROWS, PROMPT)).tolist()
        ask = functools.partial(tj.generate, prompts=prompts, max_new_tokens=ANSWER)
        model.hf["eos_token_id"] = None  # type: ignore[index]
        single = model.with_params(one.attach(model.params, members[0][1]))
        several = model.with_params(many.attach(model.params, adapters))
        return {
            "one": lambda: ask(single),
            "twelve": lambda: ask(several, adapters=range(ROWS)),
            "base": lambda: ask(model),
        }
    tokens = jnp.asarray(rng.integers(100, 40000, (ROWS, SEQ)), jnp.int32)
    weights = jnp.full((ROWS, SEQ), 1 / tokens.size).at[:, 0].set(0)
    batch = {"tokens": tokens, "weights": weights}
    own = batch | {"adapters": jnp.arange(ROWS, dtype=jnp.int32)}
    policies = tj.policy(model, one), tj.policy(model, many)
    if what == "training":
        return {
            "one": trainer(tj.losses.sft(policies[0]), members[0][1], batch),
            "twelve": trainer(tj.losses.sft(policies[1]), adapters, own),
        }
    return {
        "one": lambda: logprobs(policies[0], members[0][1], batch),
        "twelve": lambda: logprobs(policies[1], adapters, own),
        "base": lambda: logprobs(tj.policy(model, one), None, batch),
    }


def _noise(seed: int, name: str, leaf: jax.Array) -> jax.Array:
    return leaf + 0.01 * jax.random.normal(tree.key_for(jax.random.key(seed), name), leaf.shape)


def main() -> None:
    """Alternates the sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--what", nargs="*", default=["scoring", "training", "serving"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    print(
        "| what | dtype | one adapter, s | twelve, s | ratio | without, s |\n|---|---|---|---|---|---|"
    )
    for what in args.what:
        for dtype in args.dtype:
            runs = sides(what, jnp.dtype(dtype))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(args.repeats + 1):  # the first compiles
                for name, run in runs.items():
                    times[name].append(seconds(run))
            middle = {name: statistics.median(t[1:]) for name, t in times.items()}
            ratio = statistics.median(
                b / a for a, b in zip(times["one"][1:], times["twelve"][1:], strict=True)
            )
            base = f"{middle['base']:.3f}" if "base" in middle else ""
            cells = (
                what,
                dtype,
                f"{middle['one']:.3f}",
                f"{middle['twelve']:.3f}",
                f"**{ratio:.2f}**",
                base,
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
