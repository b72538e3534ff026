"""The trainjax side of a case: the library's own policy, loss and step over weights drawn on the device."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_cases import MODELS, PROMPT, Case, batch, decode_bytes, needed_flops

from trainjax import losses, peft, policies, quant, rollout, train, tree
from trainjax.models import Model, llama
from trainjax.models._model import abstract_params
from trainjax.nn import Decoder, remat
from trainjax.train import metrics

REMAT = {"projections": remat.projections, "full": remat.full, "none": None}


def measure(case: Case, trace: Path | None) -> dict[str, Any]:
    """The figures of a case; with `trace` two steps more are profiled into that folder."""
    return generate(case) if case.method == "generate" else training(case, trace)


def random_model(case: Case, dtype: Any) -> Model:
    """A model whose weights are made on the device, in the format that they are kept in.

    Matrices are normal with a deviation of 0.02, norms one. Layers are made, and quantised, one at a time, so
    that the peak is the training's.
    """
    hf = MODELS[case.model]
    module = Decoder(llama.config(hf), jnp.dtype(jnp.bfloat16), REMAT[case.remat])
    encode = quant.nf4().encode

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(dtype)

    def leaf(key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> Any:
        if name.endswith("scale"):
            return jnp.ones(shape.shape, dtype)
        key = tree.key_for(key, name)
        if not name.startswith("layers/"):
            return normal(key, shape.shape)
        layers, *sides = shape.shape
        keys = jax.random.split(key, layers)
        if case.method == "qlora" and re.search(quant.LAYERS, name):
            return jax.lax.map(lambda key: encode(normal(key, tuple(reversed(sides)))), keys)
        return jax.lax.map(lambda key: normal(key, tuple(sides)), keys)

    @jax.jit
    def init(key: jax.Array) -> Any:
        return tree.map_named(functools.partial(leaf, key), abstract_params(module))

    params = jax.block_until_ready(init(jax.random.key(0)))
    return Model(module.config, module, params, None, hf, "random", "")


def training(case: Case, trace: Path | None) -> dict[str, Any]:
    """Steps of AdamW with clipping, on one batch that is there already."""
    full = case.method == "full"
    model = random_model(case, jnp.float32 if full else jnp.bfloat16)
    method = None if full else peft.lora(rank=16, alpha=32)
    policy = policies.policy(model, method)
    loss = (
        losses.dpo(policy, policies.reference(model))
        if case.method == "dpo"
        else losses.sft(policy)
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.0))
    trained = model.params if method is None else method.init(jax.random.key(1), model.params)
    state = train.init(trained, tx)
    del model, trained  # the state has a copy
    host = batch(case)
    arrays = jax.device_put(host)
    step = train.make_step(tx)

    values, seconds, dispatched = [], [], []
    for _ in range(2 + case.steps):
        start = time.perf_counter()
        state, told = step(state, loss, arrays)
        returned = time.perf_counter()
        jax.block_until_ready((state, told))
        seconds.append(time.perf_counter() - start)
        dispatched.append(returned - start)
        values.append(float(told["loss"]))
    if not np.isfinite(values).all():
        raise ValueError(f"the losses {values} are not finite")
    peak = metrics.peak_memory_bytes()
    profile_error = None
    if trace is not None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        try:
            with jax.profiler.trace(str(trace), profiler_options=options):
                for _ in range(2):
                    state, told = step(state, loss, arrays)
                    jax.block_until_ready((state, told))
        except Exception as error:  # a profiler that is refused must not cost the figures
            profile_error = str(error)

    real = host["segments"] > 0
    targets = host["completions"] > 0 if case.method == "dpo" else host["weights"] > 0
    pairs = {"pairs_per_step": int((host["groups"] > 0).sum())} if case.method == "dpo" else {}
    step_seconds = median(
        seconds[2:]
    )  # the first compiles, the second is the first with warm caches
    return {
        "tokens_per_step": int(real.sum()),
        "filled": float(real.mean()),
        "seconds_per_step": step_seconds,
        "tokens_per_second": real.sum() / step_seconds,
        "flops_per_token": needed_flops(
            case,
            context=float(host["positions"][real].mean() + 1),
            targets=float(targets.sum() / real.sum()),
            adapter_size=0 if full else tree.count(state.params),
            pairs=case.method == "dpo",
        ),
        "peak_memory_bytes": peak,
        "compile_seconds": seconds[0] - step_seconds,
        "dispatch_seconds": median(dispatched[2:]),
        "all_seconds": seconds,
        "loss": values,
        **pairs,
        **({} if profile_error is None else {"profile_error": profile_error}),
    }


def generate(case: Case) -> dict[str, Any]:
    """Greedy decoding of `length` tokens after a prompt, prefill included, which reads the weights once."""
    model = random_model(case, jnp.bfloat16)
    # Completions are turned into text; random weights have no vocabulary to say anything in.
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda tokens, **options: "")
    model = dataclasses.replace(model, tokenizer=tokenizer)
    prompt = [list(range(1, PROMPT + 1))] * case.rows
    seconds = []
    for _ in range(1 + case.steps):
        start = time.perf_counter()
        answers = rollout.generate(model, prompt, max_new_tokens=case.length)
        seconds.append(time.perf_counter() - start)
    if (made := [len(answer.tokens) for answer in answers]) != [case.length] * case.rows:
        raise ValueError(f"{made} tokens were made where {case.length} were asked for")
    each = median(seconds[1:])
    return {
        "tokens_per_second": case.rows * case.length / each,
        "bytes_per_token": decode_bytes(case),
        "seconds_per_step": each,
        "peak_memory_bytes": metrics.peak_memory_bytes(),
        "compile_seconds": seconds[0] - each,
        "all_seconds": seconds,
    }


def probe() -> dict[str, Any]:
    """The device, and what it reaches: a large bfloat16 product, and a copy (bytes read and written)."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    side, numbers = (1024, 2**25) if on_cpu else (8192, 2**31)
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = _seconds(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), matrix)
    del matrix
    copy = _seconds(lambda x: x + 1, jnp.ones(numbers, jnp.int16))
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_limit_bytes": stats.get("bytes_limit"),
        "published_flops": None if on_cpu else metrics.peak_flops(jnp.bfloat16),
        "measured_flops": 2 * side**3 / product,
        "measured_bandwidth": 4 * numbers / copy,
    }


def _seconds(f: Any, x: jax.Array, repeats: int = 10) -> float:
    program = jax.jit(f)
    jax.block_until_ready(program(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
    return median(seconds)
