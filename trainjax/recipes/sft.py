"""Supervised fine-tuning of a model on conversations, prompts with completions, or plain text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from trainjax import data, losses, models, optim, train, tree
from trainjax.policies import policy
from trainjax.recipes import _common as common
from trainjax.recipes import _training as training
from trainjax.recipes._common import MeshConfig, PeftConfig
from trainjax.types import Params, Peft


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a model; writes adapter, checkpoints, metrics and settings to --out."""

    model: str
    """A hub id, a folder, a .gguf file, or a name that `trainjax fetch` knows."""
    data: str
    """Rows: a .jsonl, .json, .csv or .parquet file, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    out: Path
    """Folder of the run."""
    eval_data: str | None = None
    """Held-out rows; their loss is reported."""
    steps: int | None = None
    """Optimizer steps; one pass over the data if not given."""
    batch_size: int = 8
    """Rows of a batch, over all devices and micro-batches; a packed row holds several examples."""
    max_length: int = 512
    """Tokens of a row; longer examples are handled by --too-long."""
    learning_rate: float = 2e-4
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    warmup: float = 0.03
    """Warm-up in steps, or below 1 a fraction of the run."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest global norm of the gradients."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into: less memory, the same result."""
    peft: PeftConfig = PeftConfig()
    full: bool = False
    """Train every weight instead of an adapter."""
    dtype: common.DtypeName | None = None
    """Of frozen weights and arithmetic; by default as stored, and what the platform is fast at."""
    packing: common.PackingName = "best-fit"
    """Several examples a row, or one."""
    too_long: common.TooLongName = "truncate"
    """What happens to an example longer than --max-length."""
    template: bool = True
    """Put plain prompts and completions into the chat template."""
    remat: common.RematName = "projections"
    """What the backward pass keeps, from least memory (full) to most (none)."""
    seed: int = 0
    """Of the adapter's start, the order of the data and dropout."""
    save_every: int = 0
    """Steps between checkpoints; one at the end in any case."""
    keep: int = 3
    """Checkpoints kept."""
    eval_every: int = 0
    """Steps between evaluations; one at the end in any case."""
    resume: bool = False
    """Continue the run in --out from its newest sound checkpoint."""
    mesh: MeshConfig = MeshConfig()
    tensorboard: bool = False
    """Write scalars for TensorBoard to OUT/tensorboard."""
    wandb: str | None = None
    """Project to log to, if Weights & Biases is installed."""


def main(config: Config) -> None:
    """Runs the job."""
    training.claim_folder(config.out, resume=config.resume)
    rows = data.read(config.data)  # before the model: a mistyped name should not cost a minute
    eval_rows = data.read(config.eval_data) if config.eval_data else None
    mesh = config.mesh.mesh()
    model = common.load_model(config.model, dtype=config.dtype, mesh=mesh, remat=config.remat)
    if model.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size}: a batch has at least one row")

    plan = data.Plan(
        config.batch_size, config.max_length, common.PACKING[config.packing], config.seed
    )
    encode = functools.partial(
        training.encode,
        model=model,
        max_length=config.max_length,
        template=config.template,
        too_long=common.TOO_LONG[config.too_long],
    )
    examples = encode(config.data, rows)
    loader = data.Loader(examples, plan, mesh)
    steps = len(plan.epoch(examples, 0)) if config.steps is None else config.steps
    if steps < 1:
        raise ValueError(f"steps={steps}: a run has at least one")
    schedule = optim.warmup_cosine(config.learning_rate, steps, config.warmup)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )
    method = None if config.full else config.peft.method()
    loss = losses.sft(policy(model, method))
    state = train.init(_start(config, method, model), tx, config.seed)
    if config.full:
        model = model.with_params(None)  # the state has its own; no second copy stays
    evaluate = None
    if config.eval_data and eval_rows is not None:
        held_out = encode(config.eval_data, eval_rows)
        evaluate = train.evaluator(loss, lambda: data.one_epoch(held_out, plan, mesh))

    settings = training.settings(config, _SAME, steps=steps, model=model, examples=examples)
    with contextlib.closing(train.Checkpoints(config.out / "checkpoints", config.keep)) as saved:
        state, num_tokens = training.resumed(state, saved, loader, settings, wanted=config.resume)
        common.save_config(config, config.out / "config.yaml")
        step = train.make_step(tx, accumulate=config.accumulate)
        with training.sinks(
            config.out, steps, int(state.step), config.tensorboard, config.wandb
        ) as to:
            state = train.fit(
                state,
                step,
                loss,
                loader,
                steps=steps,
                sinks=to,
                checkpoints=saved,
                save_every=config.save_every,
                evaluate=evaluate,
                eval_every=config.eval_every,
                settings=settings,
                derived=training.rates(model, examples, state.params, schedule, full=config.full),
                num_tokens=num_tokens,
            )
    if method is not None:
        models.save_adapter(config.out / "adapter", model, method, state.params)
    elif not (config.out / "model").exists():  # it does where a finished run is resumed
        models.save_model(config.out / "model", model, state.params)


_SAME = (  # what must be equal for a resumed run to be the same run
    *("batch_size", "max_length", "packing", "template", "too_long", "seed", "dtype", "accumulate"),
    *("learning_rate", "warmup", "weight_decay", "clip", "full", "peft"),
)


def _start(config: Config, method: Peft | None, model: models.Model) -> Params:
    if method is None:
        return tree.cast(model.params, jnp.float32)
    return method.init(jax.random.key(config.seed), model.params)
