"""What the experiments on optimization train: a small decoder from scratch, and LoRA on SmolLM2.

Both read ../shared/data/{instructions,dialogues}.{train,test}.jsonl.gz.
"""

import argparse
import functools
import gzip
import json
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
from trainjax.types import Batch, Loss, Params

DATA = Path(__file__).resolve().parents[2] / "shared/data"
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
        loss, curvature: of the params, on a batch; `curvature` is of labels that the model draws.
        first: `(seed) -> params`.
        batches: `(seed) -> batches`, without end.
        evaluate: the held-out loss of params.
    """

    loss: Loss
    curvature: Loss
    first: Callable[[int], Params]
    batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[Params], float]


def text(name: str) -> bytes:
    """Everything that is said in a split, one after another."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return "\n".join(said for line in lines for said in _said(json.loads(line))).encode()


def _said(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["instruction"], row["input"], row["output"]]


def scratch(
    *, compute_dtype: Any = jnp.float32, remat: Any = None, fp8: bool = False, rows: int = 8
) -> Workload:
    """A decoder of 0.9 million numbers on bytes of text, 8 rows of 128; held out are 64 other rows."""
    seq = 128
    model = tj.models.random_model(
        SMALL, jax.random.key(0), compute_dtype=compute_dtype, remat=remat
    )
    policy = tj.policy((model.with_fp8() if fp8 else model).with_params(None))
    known = np.frombuffer(text("instructions.train") + text("dialogues.train"), np.uint8)
    held_out = np.frombuffer(text("dialogues.test") + text("instructions.test"), np.uint8)

    def batch(source: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.stack([source[start : start + seq] for start in starts]).astype(np.int32)
        weights = np.full(tokens.shape, 1 / (len(starts) * (seq - 1)), np.float32)
        weights[:, 0] = 0
        return {"tokens": tokens, "weights": weights}

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        while True:
            yield batch(known, rng.integers(0, len(known) - seq, rows))

    fixed = batch(held_out, np.arange(64) * (len(held_out) // 65))
    loss = losses.sft(policy)
    value = jax.jit(lambda loss, params: loss(params, fixed)[0])
    return Workload(
        loss,
        losses.drawn(policy),
        lambda seed: tj.models.random_model(SMALL, jax.random.key(seed)).params,
        batches,
        lambda params: float(value(loss, params)),
    )


def lora(dtype: Any = jnp.bfloat16) -> Workload:
    """LoRA of rank 16 on SmolLM2-135M-Instruct, four rows of up to 128 tokens."""
    length = 128
    model = tj.load("smollm2-135m-instruct", dtype=dtype, compute_dtype=dtype)
    method = tj.peft.lora()
    policy = tj.policy(model, method)

    @functools.cache
    def examples(split: str, every: int) -> Any:
        with gzip.open(DATA / f"instructions.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines][::every]
        return data.encode(rows, model.tokenizer, length)

    loss = losses.sft(policy)
    held_out = lambda: data.one_epoch(examples("test", 20), data.Plan(8, length))  # noqa: E731
    told = train.evaluator(loss, held_out)
    return Workload(
        loss,
        losses.drawn(policy),
        lambda seed: method.init(jax.random.key(seed), model.params),
        lambda seed: iter(data.Loader(examples("train", 1), data.Plan(4, length, seed=seed))),
        lambda params: told(params)["eval_loss"],
    )


def trained(
    work: Workload,
    tx: Any,
    step: train.step.Step,
    *,
    steps: int,
    every: int,
    seed: int = 0,
    params: Params | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One run: the held-out loss every so many steps, losses, seconds of a step, bytes of the state.

    It ends where a loss is not finite.
    """
    first = work.first(seed) if params is None else params
    state, batches = train.init(first, tx, seed), work.batches(seed)
    curve, records, times = [], [], []
    for number in range(1, steps + 1):
        batch = next(batches)
        start = time.perf_counter()
        state, metrics = step(state, work.loss, batch, **extra)
        told = jax.device_get(metrics)
        times.append(time.perf_counter() - start)
        if not told["is_finite"] or not np.isfinite(told["loss"]):
            break
        records.append({name: float(value) for name, value in told.items()})
        if number % every == 0:
            own = optim.eval_params(state.opt_state, tree.trainable(state.params))
            curve.append(work.evaluate(tree.with_trained(state.params, own)))
    kept = sorted(times[2:])[: max(1, int(0.98 * len(times[2:])))]
    return {
        "curve": curve,
        "records": records,
        "seconds": float(np.mean(kept)) if kept else 0.0,
        "bytes": tree.num_bytes(state.opt_state),
    }


def arguments(
    parser: argparse.ArgumentParser, out: str, **defaults: int | None
) -> argparse.Namespace:
    """The command line's arguments, with --out and some numbers such as --steps; makes the folder.

    Ends the process with a word where the rows are not there.
    """
    parser.add_argument("--out", type=Path, default=Path(out))
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"the rows are not at {DATA}")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def remembered(
    file: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The line of a file with this key; made and added where it is not there yet."""
    lines = file.read_text().splitlines() if file.exists() else []
    for line in map(json.loads, lines):
        if all(line[name] == value for name, value in key.items()):
            return line
    found = key | make()
    with file.open("a") as out:
        out.write(json.dumps(found) + "\n")
    last = found["curve"][-1] if found.get("curve") else float("nan")
    print(f"{key}: {last:.4f}", flush=True)
    return found
