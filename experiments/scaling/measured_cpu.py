"""A plan of this machine beside what steps of real training take on it; see README.md.

python experiments/scaling/measured_cpu.py --out experiments/scaling/measured_cpu.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"
SETTINGS = [  # rows, tokens of a row, remat
    (2, 256, "full"),
    (4, 512, "full"),
    (4, 512, "projections"),
    (8, 512, "projections"),
    (4, 512, "none"),
]


def planned(rows: int, length: int, remat: str) -> dict[str, float]:
    """What `trainjax plan` says."""
    path = Path("plan.json.tmp")
    flags = ["--model", MODEL, "--device", "cpu", "--batch-size", rows, "--max-length", length]
    flags += ["--remat", remat, "--json", path]
    subprocess.run(
        [sys.executable, "-m", "trainjax.cli", "plan", *map(str, flags)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    told = json.loads(path.read_text())
    (plan,) = told["plans"]
    path.unlink()
    assert plan["bound"] == "compute"  # so that seconds are work over speed
    speed = told["device"]["flops"]
    work = plan["step_seconds"] * speed
    return {"bytes": plan["memory"]["total"], "work": work, "flops_per_second": speed}


def measured(rows: int, length: int, remat: str) -> dict[str, float]:
    """Live arrays and the growth of the resident set in a step, and the fastest of four steps' times."""
    import jax
    import jax.numpy as jnp

    from trainjax import losses, train
    from trainjax.policies import policy
    from trainjax.recipes import _common as common
    from trainjax.recipes._configs import StepConfig

    config = StepConfig(model=MODEL, out=Path(), batch_size=rows, max_length=length, remat=remat)
    model = common.load_model(MODEL, remat=remat)
    method = config.peft_method()
    tx = config.optimizer(1000, model)
    own = policy(model, method)
    state = train.init(method.init(jax.random.key(0), model.params), tx)
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 49152, jnp.int32)
    batch = {
        "tokens": tokens,
        "weights": jnp.full((rows, length), 1 / (rows * length)),
        "segments": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
    }
    step, loss = train.make_step(tx), losses.sft(own)
    program = train.step.lowered(step, state, loss, batch)
    run = program.compile()
    leaves = [x for x in jax.tree.leaves((state, loss, batch)) if isinstance(x, jax.Array)]
    held = sum(x.nbytes for x in leaves)
    train.step._return_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    arrays = [x for x in jax.tree.leaves(loss) if isinstance(x, jax.Array)]
    state, _ = jax.block_until_ready(run(state, arrays, batch))
    peak = _status("VmHWM") - before
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(run(state, arrays, batch))
        seconds.append(time.perf_counter() - start)
    return {"bytes": held + peak, "seconds": min(seconds)}


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def main() -> None:
    """Measures the settings and writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3)
    given = parser.parse_args()
    if given.one:
        rows, length, remat = given.one
        print(json.dumps(measured(int(rows), int(length), remat)))
        return
    found = []
    for rows, length, remat in SETTINGS:
        command = [sys.executable, __file__, "--one", str(rows), str(length), remat]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        plan, real = planned(rows, length, remat), json.loads(text.splitlines()[-1])
        found.append({"rows": rows, "length": length, "remat": remat, "plan": plan, "real": real})
    # The machine's speed is measured with each plan, on cores shared with others: the median serves all.
    speed = statistics.median(row["plan"]["flops_per_second"] for row in found)
    for row in found:
        plan, real = row["plan"], row["real"]
        plan["seconds"] = plan["work"] / speed
        ratio = plan["bytes"] / real["bytes"]
        print(
            f"| {row['rows']} x {row['length']} | {row['remat']} | {plan['bytes'] / 1e9:.3f} | "
            f"{real['bytes'] / 1e9:.3f} | {ratio:.2f} | {plan['seconds']:.2f} | {real['seconds']:.2f} |"
        )
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
