"""What an optimizer costs beside the gradient: memory of its state, and time of its update.

    trainjax fetch smollm2-135m-instruct
    python experiments/benchmarks/optimizers.py

SmolLM2-135M-Instruct in float32, 4 rows of 256 tokens, `remat` projections: full tuning, and LoRA of rank
16 on all linear layers. The gradient and the update are two programs here, run by turns in one process, so
that each can be timed; medians. Every optimizer is a process of its own, for its peak memory. "Of the step"
is the update over gradient and update together.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trainjax as tj
from trainjax import losses, optim, platform, tree
from trainjax.nn import remat

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-4, weight_decay=0.1),
    "adamw_8bit": lambda: optim.adamw_8bit(1e-4, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-4, weight_decay=0.1),
    "lion_8bit": lambda: optim.lion_8bit(1e-4, weight_decay=0.1),
    "fira": lambda: optim.fira(1e-4, rank=128, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-4),
    "sgd": lambda: optax.sgd(1e-4),
}

COLUMNS = (
    *("optimizer", "state, MB", "a parameter, bytes", "gradient, s", "update, s", "of the step"),
    "peak, GB",
)


def measure(name: str, what: str, rounds: int) -> dict[str, Any]:
    """Bytes and seconds of one optimizer."""
    model = tj.load("smollm2-135m-instruct", dtype=jnp.float32, remat=remat.projections)
    method = tj.peft.lora(rank=16) if what == "lora" else None
    loss = losses.sft(tj.policy(model, method))
    params = model.params if method is None else method.init(jax.random.key(0), model.params)
    if method is None:
        loss = losses.sft(tj.policy(model.with_params(None)))
    tokens = np.random.default_rng(0).integers(0, 49152, (4, 256)).astype(np.int32)
    batch = {"tokens": tokens, "weights": np.full((4, 256), 1 / 1024, np.float32)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name]())
    gradient = platform.jit(jax.grad(lambda p, loss, batch: loss(p, batch)[0]))

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    run_update = jax.jit(update, donate_argnums=(0, 1, 2))
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    del model
    of_gradient, of_update = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        grads = jax.block_until_ready(gradient(params, loss, batch))
        of_gradient.append(time.perf_counter() - start)
        start = time.perf_counter()
        state, params = jax.block_until_ready(run_update(grads, state, params))
        of_update.append(time.perf_counter() - start)
    return {
        "name": name,
        "state": tree.num_bytes(state),
        "params": tree.num_bytes(params),
        "gradient": statistics.median(of_gradient[1:]),
        "update": statistics.median(of_update[1:]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """One optimizer with --only, or a process for each and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=OPTIMIZERS)
    parser.add_argument("--what", choices=("full", "lora"), default="full")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.what, args.rounds)))
        return
    for what in ("full", "lora"):
        print(f"\n{what}\n\n| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|")
        for name in OPTIMIZERS:
            command = [sys.executable, __file__, "--only", name, "--what", what]
            out = subprocess.run(
                [*command, "--rounds", str(args.rounds)], capture_output=True, text=True, check=True
            )
            found = json.loads(out.stdout.splitlines()[-1])
            share = found["update"] / (found["update"] + found["gradient"])
            each = found["state"] / (found["params"] / 4)
            cells = [name, f"{found['state'] / 1e6:.1f}", f"{each:.2f}", f"{found['gradient']:.2f}"]
            cells += [f"{found['update']:.3f}", f"**{share:.1%}**", f"{found['peak']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
