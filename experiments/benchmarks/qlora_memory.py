"""What QLoRA takes: measured on SmolLM2, and on paper for Llama 3.1 of 8 and 70 billion weights.

    trainjax fetch smollm2-135m-instruct
    python experiments/benchmarks/qlora_memory.py measure

runs each line in a process of its own: batch 1 x 512, rank 16 on all linear layers, AdamW, three steps. The
step is compiled ahead, on abstract shapes; then the peak of the resident size is set back, the model is
loaded (quantised while loading) and trained. What is reported is the peak from then on, less the resident
size before; and what XLA says of the program.

    pip install 'jax[cuda13]'      # or jax[tpu]; no accelerator is needed
    python experiments/benchmarks/qlora_memory.py paper --device h100 --model 8b

compiles one step of 2 x 2048 tokens for a device that is not there, without making an array: arguments are
the quantised base, its bfloat16 embedding and head, the adapter and both moments of AdamW in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from trainjax import models, peft, policies, quant, tree
from trainjax.losses import sft
from trainjax.models._model import Model, abstract_params, family
from trainjax.nn import Decoder, remat
from trainjax.ops import attention
from trainjax.platform import compiler_options
from trainjax.train.step import _gradients, _return_freed_memory

GIB = 2**30
METHOD = peft.lora(rank=16, alpha=32)
TX = optax.adamw(2e-4, weight_decay=0.0)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
SIZES = {
    "8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LINES = {  # name: format, dtype of weights and arithmetic
    "lora-float32": (None, None),
    "qlora-float32": ("nf4", None),
    "qlora-bfloat16": ("nf4", "bfloat16"),
}


def step(accumulate: int, adapter: Any, opt_state: Any, loss: Any, batch: Any) -> Any:
    """What `train.make_step` does, less its check for numbers that are not finite."""
    key, number = jax.random.key(0), jnp.zeros((), jnp.int32)
    grads, metrics = _gradients(loss, adapter, number, batch, key, accumulate)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = TX.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, metrics["loss"]


def abstract_model(hf: dict[str, Any], dtype: Any, to: quant.Format | None, keep: Any) -> Model:
    """A model of shapes alone."""
    module = Decoder(family(hf).config(hf), jnp.dtype(dtype), keep)

    def leaf(name: str, w: Any) -> Any:
        if to is not None and re.search(quant.LAYERS, name):
            *stack, fan_in, fan_out = w.shape
            return jax.eval_shape(
                to.encode, jax.ShapeDtypeStruct((*stack, fan_out, fan_in), jnp.float32)
            )
        return jax.ShapeDtypeStruct(w.shape, dtype)

    params = tree.map_named(leaf, abstract_params(module))
    return Model(module.config, module, params, None, hf, "abstract", "")


def abstract_step(model: Model, rows: int, seq: int) -> tuple[Any, ...]:
    """The arguments of `step`, as shapes."""
    adapter = jax.eval_shape(METHOD.init, jax.random.key(0), model.params)
    opt_state = jax.eval_shape(TX.init, adapter)
    loss = sft(policies.policy(model, METHOD))
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, seq), jnp.int32),
        "weights": jax.ShapeDtypeStruct((rows, seq), jnp.float32),
    }
    return adapter, opt_state, loss, batch


def compiled(arguments: tuple[Any, ...], accumulate: int = 1, **options: Any) -> Any:
    """The training step as XLA has compiled it; nothing runs."""
    program = jax.jit(functools.partial(step, accumulate), donate_argnums=(0, 1), **options)
    return program.lower(*arguments).compile()


def sizes(program: Any) -> dict[str, float]:
    """What XLA says of a program, in GiB; donated arguments are not counted twice in the total."""
    stats = program.memory_analysis()
    kinds = ("argument", "output", "temp", "alias")
    found = {kind: getattr(stats, f"{kind}_size_in_bytes") / GIB for kind in kinds}
    total = found["argument"] + found["output"] + found["temp"] - found["alias"]
    return {kind: round(size, 4) for kind, size in (found | {"total": total}).items()}


def status(field: str) -> int:
    """A size of this process in bytes, as /proc has it: VmRSS, VmHWM."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_line(name: str, source: str) -> dict[str, Any]:
    """Peak resident size of loading and training, in a process that has done nothing else."""
    to, dtype = LINES[name]
    form = None if to is None else quant.nf4(double=True)
    hf = dict(models._load.open_checkpoint(source).config)
    keep = remat.full
    kind = jnp.dtype(dtype or "float32")
    shapes = abstract_model(hf, kind, form, keep)
    models._load.open_checkpoint(source).tokenizer()  # imports of 70 MB that are no weights
    program = compiled(abstract_step(shapes, 1, 512), compiler_options=compiler_options())
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    model = models.load(source, quantise=form, dtype=dtype, compute_dtype=kind, remat=keep)
    loaded = status("VmRSS") - before
    loading_peak = status("VmHWM") - before
    adapter = METHOD.init(jax.random.key(0), model.params)
    opt_state = jax.jit(TX.init)(adapter)
    loss = sft(policies.policy(model, METHOD))
    ids = np.arange(512, dtype=np.int32)[None] % 1000 + 100
    batch = {"tokens": ids, "weights": np.full((1, 512), 1 / 512, np.float32)}
    jax.block_until_ready((adapter, opt_state))
    gc.collect()
    _return_freed_memory()  # as `make_step` does when it has compiled
    for _ in range(3):
        adapter, opt_state, value = program(adapter, opt_state, loss, batch)
    jax.block_until_ready(adapter)
    return {
        "line": name,
        "before": before / 1e6,
        "loaded": loaded / 1e6,
        "loading_peak": loading_peak / 1e6,
        "peak": (status("VmHWM") - before) / 1e6,
        "weights": tree.num_bytes(model.params) / 1e6,
        "xla_gib": sizes(program),
        "loss": float(value),
    }


def measure(source: str) -> None:
    """Every line in a process of its own."""
    for name in LINES:
        command = [sys.executable, __file__, "line", "--line", name, "--source", source]
        print(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(),
            flush=True,
        )


def paper(given: argparse.Namespace) -> None:
    """One step compiled for a device that is described, not there."""
    device, size, rows, seq = given.device, given.model, given.rows, given.seq
    options: dict[str, Any] = {}
    if device == "h100":
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
        jax.default_backend = lambda: "gpu"  # what the library's choices for a platform ask
        if not given.cudnn:
            attention._cudnn_refuses = lambda *_: "a machine without it"
    elif device == "cpu":
        topology = None
        options = {"compiler_options": compiler_options()}
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device)
        jax.default_backend = lambda: "tpu"
    form = {"nf4": quant.nf4(), "int8": quant.int8(), "none": None}[given.format]
    model = abstract_model(SIZES[size], jnp.bfloat16, form, remat.full)
    arguments = abstract_step(model, rows, seq)
    parts = {
        "layers": tree.num_bytes(model.params["layers"]) / GIB,
        "embedding and head": 2 * tree.num_bytes(model.params["head"]) / GIB,
        "adapter": tree.num_bytes(arguments[0]) / GIB,
        "moments": tree.num_bytes(arguments[1]) / GIB,
    }
    if topology is not None:
        place = SingleDeviceSharding(topology.devices[0])
        placed = functools.partial(jax.ShapeDtypeStruct, sharding=place)
        arguments = jax.tree.map(lambda x: placed(x.shape, x.dtype), arguments)
        options = {"out_shardings": place}
    found = sizes(compiled(arguments, given.accumulate, **options))
    parts = {name: round(part, 3) for name, part in parts.items()}
    print(json.dumps({**vars(given), "parts_gib": parts, "xla_gib": found}))


def main() -> None:
    """Runs one of the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["measure", "line", "paper"])
    parser.add_argument("--line", choices=list(LINES))
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument(
        "--device", default="h100", help="h100, cpu or a TPU topology, v5p:2x2x1 say"
    )
    parser.add_argument("--model", choices=list(SIZES), default="8b")
    parser.add_argument("--format", choices=["nf4", "int8", "none"], default="nf4")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of the rows")
    parser.add_argument("--cudnn", action="store_true", help="its attention; takes the library")
    given = parser.parse_args()
    if given.job == "measure":
        measure(given.source)
    elif given.job == "line":
        print(json.dumps(measure_line(given.line, given.source)))
    else:
        paper(given)


if __name__ == "__main__":
    main()
