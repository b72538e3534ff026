"""What recipes that train share: the run's folder, encoding, what makes a resumed run the same, rates."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainjax import data, losses, models, optim, train, tree
from trainjax.models import Model
from trainjax.nn import flops_per_token
from trainjax.policies import Policy, policy
from trainjax.recipes import _common as common
from trainjax.recipes._common import MeshConfig, PeftConfig, say
from trainjax.recipes._optim import OptimConfig, ScheduleConfig
from trainjax.train import metrics
from trainjax.train.step import Step
from trainjax.types import Loss, Params, Peft


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of steps: what they train, on which rows, how."""

    model: str
    """A hub id, a folder, a .gguf file, or a name that `trainjax fetch` knows."""
    out: Path
    """Folder of the run."""
    steps: int | None = None
    """Optimizer steps, of each task where there are several; one pass over its rows if not given."""
    batch_size: int = 8
    """Rows of a batch, over all devices and micro-batches; a packed row holds several examples."""
    max_length: int = 512
    """Tokens of a row; longer examples are handled by --too-long."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""
    warmup: float = 0.03
    """Linear warm-up in steps, or below 1 a fraction of them."""
    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    optim: OptimConfig = OptimConfig()
    clip: float = 1.0
    """Largest global norm of the gradients."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into: less memory, the same result."""
    peft: PeftConfig = PeftConfig()
    full: bool = False
    """Train every weight instead of an adapter."""
    dtype: common.DtypeName | None = None
    """Of frozen weights and arithmetic; by default as stored, and what the platform is fast at."""
    param_dtype: common.ParamDtypeName = "float32"
    """Of what trains; bfloat16 halves its memory, and its updates are rounded stochastically."""
    fp8: bool = False
    """Multiply 8-bit floats in the layers, where the platform has such products."""
    base_format: common.BaseFormatName | None = None
    """Keep the frozen matrices of the layers in 4 or 8 bits; stored is as a .gguf file has them."""
    packing: common.PackingName = "best-fit"
    """Several examples a row, or one."""
    too_long: common.TooLongName = "truncate"
    """What happens to an example longer than --max-length."""
    template: bool = True
    """Put plain prompts and completions into the chat template."""
    remat: common.RematName = "projections"
    """What the backward pass keeps, from least memory (full) to most (none)."""
    seed: int = 0
    """Of the adapter's start, the order of the data, dropout, and what else is drawn."""
    resume: bool = False
    """Continue the run in --out from its newest sound checkpoint."""
    mesh: MeshConfig = MeshConfig()
    tensorboard: bool = False
    """Write scalars for TensorBoard to OUT/tensorboard."""
    wandb: str | None = None
    """Project to log to, if Weights & Biases is installed."""

    def adapter(self) -> Peft | None:
        """The adapter's functions; None where every weight trains."""
        return None if self.full else self.peft.method()

    def rates(self, steps: int) -> optax.Schedule:
        """The learning rate at each of so many steps."""
        return self.schedule.schedule(self.learning_rate, steps, self.warmup)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Of so many steps, with the method's own part and what the dtypes need around it."""
        method = self.adapter()
        tx = self.optim.chain(self.rates(steps), self.weight_decay, self.clip)
        if method is not None and method.transform is not None:
            tx = method.transform(steps, tx)
        if self.dtype == "float16":
            tx = optim.with_loss_scale(tx)
        return (
            tx if self.param_dtype == "float32" else optim.with_stochastic_rounding(tx, self.seed)
        )

    def step(self, tx: optax.GradientTransformation, model: Model) -> Step:
        """The jitted step; `config.optim` may want a loss on drawn labels beside the run's own."""
        step = train.make_step(tx, accumulate=self.accumulate, gradient=self.optim.gradient_of())
        if not self.optim.wants_curvature():
            return step
        return functools.partial(step, curvature=losses.drawn(policy(model, self.adapter())))

    def plan(self, length: int) -> data.Plan:
        """How examples become batches of rows of this length."""
        return data.Plan(self.batch_size, length, common.PACKING[self.packing], self.seed)

    def load(self) -> Model:
        """The model, over all devices.

        Raises:
            ValueError: it has no tokenizer; its weights are to train and to stay in few bits.
        """
        if self.full and self.base_format is not None:
            raise ValueError(
                f"--full trains every weight, and --base-format {self.base_format} freezes them in few "
                "bits; leave one of the two out"
            )
        model = common.load_model(
            self.model,
            dtype=self.dtype,
            mesh=self.mesh.mesh(),
            remat=self.remat,
            base_format=self.base_format,
        )
        if model.tokenizer is None:
            raise ValueError(f"{self.model} has no tokenizer")
        return model.with_fp8() if self.fp8 else model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """The settings of a run on one dataset."""

    data: str
    """Rows: a .jsonl, .json, .csv or .parquet file, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    eval_data: str | None = None
    """Held-out rows; their loss is reported."""
    save_every: int = 0
    """Steps between checkpoints; one at the end in any case."""
    keep: int = 3
    """Checkpoints kept."""
    eval_every: int = 0
    """Steps between evaluations; one at the end in any case."""


Prepare = Callable[[Model, str, data.Examples], data.Examples]

SAME = (  # what must be equal for a resumed run to be the same run
    *("batch_size", "max_length", "packing", "template", "too_long", "seed", "dtype", "accumulate"),
    *("learning_rate", "warmup", "schedule", "weight_decay", "optim", "clip"),
    *("full", "peft", "base_format", "param_dtype", "fp8"),
)


class Job(NamedTuple):
    """A recipe's own part of a run.

    Attributes:
        loss_of: its loss on a model.
        first_params: `(model) -> params`: what trains, before the first step.
        save: `(model, params)`: writes what a finished run leaves in `--out`.
        read: how a row becomes a group of completions; None where it is one text.
        prepare: adds to the examples of a named dataset what it takes the model to know.
        same: names of the settings that a resumed run has to share.
        tells_tokens: whether the loss goes through the vocabulary, which counts in the MFU.
    """

    loss_of: Callable[[Model], Loss]
    first_params: Callable[[Model], Params]
    save: Callable[[Model, Params], None]
    read: data.Read | None = None
    prepare: Prepare = lambda model, name, examples: examples
    same: Sequence[str] = SAME
    tells_tokens: bool = True


def run(
    config: TrainConfig,
    loss_of: Callable[[Model], Loss],
    *,
    read: data.Read | None = None,
    prepare: Prepare = lambda model, name, examples: examples,
    same: Sequence[str] = SAME,
) -> None:
    """Trains a language model, whole or by an adapter; see `Job` and `run_job`."""
    first, save = (functools.partial(f, config) for f in (first_params, _save))

    def loss(model: Model) -> Loss:
        return with_penalty(loss_of(model), policy(model, config.adapter()))

    run_job(config, Job(loss, first, save, read, prepare, same))


def run_job(config: TrainConfig, job: Job) -> None:
    """Reads rows and model, trains, and writes what a run leaves.

    Args:
        config: the recipe's settings.
        job: the recipe's own part.

    Raises:
        ValueError: a setting, a file or a row that cannot be; one sentence says which and why.
    """
    claim_folder(config.out, resume=config.resume)
    rows = data.read(config.data)  # before the model: a mistyped name should not cost a minute
    eval_rows = data.read(config.eval_data) if config.eval_data else None
    model = config.load()
    mesh = model.module.mesh
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size}: a batch has at least one row")

    examples = encode(config, config.data, rows, model, job.read)
    examples = job.prepare(model, config.data, examples)
    held_out = None
    if config.eval_data and eval_rows is not None:
        held_out = encode(config, config.eval_data, eval_rows, model, job.read)
        held_out = job.prepare(model, config.eval_data, held_out)
    length = max(data.row_length(e, config.max_length) for e in (examples, held_out) if e)
    plan = config.plan(length)
    loader = data.Loader(examples, plan, mesh)
    steps = len(plan.epoch(examples, 0)) if config.steps is None else config.steps
    if steps < 1:
        raise ValueError(f"steps={steps}: a run has at least one")
    if config.optim.wants_curvature() and not job.tells_tokens:
        raise ValueError(
            "--optim.name sophia_g draws labels from a language model, which this job's loss is not; "
            "sophia_h takes any loss"
        )
    tx, schedule = config.optimizer(steps), config.rates(steps)
    loss = job.loss_of(model)
    state = train.init(job.first_params(model), tx, config.seed)
    if config.full:
        model = model.with_params(None)  # the state has its own; no second copy stays
    evaluate = None
    if held_out is not None:
        evaluate = train.evaluator(loss, lambda: data.one_epoch(held_out, plan, mesh))

    shared = settings(config, job.same, steps=steps, model=model, examples=examples)
    with contextlib.closing(train.Checkpoints(config.out / "checkpoints", config.keep)) as saved:
        state, num_tokens = resumed(state, saved, loader, shared, wanted=config.resume)
        common.save_config(config, config.out / "config.yaml")
        step = config.step(tx, model)
        with sinks(config.out, steps, int(state.step), config.tensorboard, config.wandb) as to:
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
                evaluated=evaluated,
                settings=shared,
                derived=rates(
                    model,
                    examples,
                    state.params,
                    schedule,
                    full=config.full,
                    targets=float(examples.trained.mean()) if job.tells_tokens else 0.0,
                ),
                num_tokens=num_tokens,
            )
    job.save(model, evaluated(state))


def evaluated(state: train.TrainState) -> Params:
    """The params of a state, or the average of them that its optimizer keeps."""
    trained = optim.eval_params(state.opt_state, tree.trainable(state.params))
    return tree.with_trained(state.params, trained)


def with_penalty(loss: Loss, policy: Policy, part: str | None = None) -> Loss:
    """A recipe's loss and, where the policy's method has one, the method's own term.

    Args:
        loss: of the policy.
        policy: as it trains.
        part: the name under which the policy's params are in those of the loss, if they are a part.
    """
    if policy.peft is None or policy.peft.penalty is None:
        return loss
    own = losses.adapter_penalty(policy)
    return loss + (own if part is None else losses.at(part, own))


def first_params(config: StepConfig, model: Model) -> Params:
    """What trains, before the first step."""
    method = config.adapter()
    if method is None:
        params = tree.cast(model.params, jnp.float32)
    else:
        params = method.init(jax.random.key(config.seed), model.params)
    return tree.cast(params, common.DTYPES[config.param_dtype])


def _save(config: TrainConfig, model: Model, params: Params) -> None:
    method = config.adapter()
    if method is not None:
        models.save_adapter(config.out / "adapter", model, method, params)
    elif not (config.out / "model").exists():  # it does where a finished run is resumed
        models.save_model(config.out / "model", model, params)


def claim_folder(out: Path, *, resume: bool) -> None:
    """Makes the run's folder, or says at once why it cannot be used.

    Raises:
        ValueError: it holds another run and this one does not continue it.
        OSError: it cannot be written.
    """
    if not resume and any(
        (out / name).exists() for name in ("config.yaml", "checkpoints", "adapter", "model")
    ):
        raise ValueError(
            f"{out} holds another run; continue it with --resume, or give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def resumed(
    state: train.TrainState,
    saved: train.Checkpoints,
    loader: data.Loader,
    settings: Mapping[str, Any],
    *,
    wanted: bool,
) -> tuple[train.TrainState, int]:
    """The state to begin with and the tokens seen before it; the loader is moved to its place.

    Raises:
        ValueError: the checkpoint is of a run with other settings; both values are named.
    """

    def accept(extra: Mapping[str, Any]) -> None:
        before = extra["settings"]
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"the run in {saved.directory.parent} had {name}={before.get(name)!r}, now it is "
                    f"{value!r}; resume with the same, or start another run with another --out"
                )

    found = saved.restore(state, accept) if wanted else None
    if found is None:
        if wanted:
            say(f"no checkpoint in {saved.directory}: starting from the beginning")
        return state, 0
    loader.set_state(found.extra["batches"])
    say(f"resuming after step {found.step}")
    return found.state, found.extra["num_tokens"]


@contextlib.contextmanager
def sinks(
    out: Path, steps: int, done: int, tensorboard: bool, wandb: str | None
) -> Iterator[list[metrics.Sink]]:
    """Where a run's records go: `metrics.jsonl` and the terminal, and what else is asked for."""
    with contextlib.ExitStack() as stack:
        to = [stack.enter_context(metrics.jsonl(out / "metrics.jsonl", after_step=done))]
        to.append(stack.enter_context(metrics.progress(steps, done)))
        if tensorboard:
            to.append(stack.enter_context(metrics.tensorboard(out / "tensorboard")))
        if wandb:
            to.append(
                stack.enter_context(metrics.wandb(project=wandb, name=out.name, dir=str(out)))
            )
        yield to


def encode(
    config: StepConfig,
    name: str,
    rows: data.Source,
    model: Model,
    read: data.Read | None = None,
) -> data.Examples:
    """Tokens and masks of the rows that a flag named, and a word about them.

    Raises:
        ValueError: rows that cannot be read, with their file's name; a tokenizer of another model.
    """
    too_long, encoder = common.TOO_LONG[config.too_long], data.encode
    if read is not None:
        share = model.config.window is None
        encoder = functools.partial(data.encode_groups, read=read, share_prompt=share)
    try:
        examples = encoder(
            rows, model.tokenizer, config.max_length, template=config.template, too_long=too_long
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if (largest := int(examples.tokens.max())) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model.source} gives the token {largest}, but the model's "
            f"vocab_size={model.config.vocab_size}; they are not of one model"
        )
    say(examples.summary())
    return examples


def settings(
    config: Any, names: Sequence[str], *, steps: int, model: Model, examples: data.Examples
) -> dict[str, Any]:
    """The named fields of a recipe's settings, groups of flags field by field, and what they act on."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name)
        value = value.resolved() if isinstance(value, PeftConfig) else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            found[name] = value
    found = {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}  # as JSON
    return found | {"steps": steps, "model": model.fingerprint, "data": examples.fingerprint()}


def rates(
    model: Model,
    examples: data.Examples,
    params: Params,
    schedule: Callable[[int], Any],
    *,
    full: bool,
    targets: float,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`(record) -> record` with the step's learning rate and MFU."""
    flops = flops_per_token(
        model.config,
        context=float((examples.lengths**2).sum() / examples.lengths.sum() / 2),
        adapter_size=0 if full else tree.count(params),
        full=full,
        targets=targets,
    )
    peak = metrics.peak_flops(model.module.dtype)

    def with_rates(record: dict[str, Any]) -> dict[str, Any]:
        rate = float(schedule(record["step"] - 1))
        mfu = None if peak is None else record["tokens_per_second"] * flops / peak
        return record | {"learning_rate": rate, "mfu": mfu}

    return with_rates
