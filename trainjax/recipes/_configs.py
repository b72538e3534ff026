"""The settings that jobs which train have in common, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from trainjax import data, optim, train
from trainjax.io.hub import read_config
from trainjax.models import Model
from trainjax.models._model import abstract_params, family
from trainjax.nn import Decoder
from trainjax.recipes import _common as common
from trainjax.recipes._common import MeshConfig, PeftConfig
from trainjax.recipes._optim import OptimConfig, ScheduleConfig
from trainjax.train.step import Step
from trainjax.types import Loss, Peft


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
    """Dtype of frozen weights and arithmetic; by default as stored, and what the platform is fast at."""
    param_dtype: common.ParamDtypeName = "float32"
    """Dtype of what trains; bfloat16 halves its memory, and its updates are rounded stochastically."""
    fp8: bool = False
    """Multiply 8-bit floats in the layers, where the platform has such products."""
    base_format: common.BaseFormatName | None = None
    """Keep the frozen matrices of the layers in 4 or 8 bits; stored is as a .gguf file has them."""
    packing: common.PackingName = "best-fit"
    """Several examples a row, or one."""
    too_long: common.TooLongName = "truncate"
    """What happens to an example longer than --max-length."""
    bad_rows: common.BadRowsName = "error"
    """What happens to a row that cannot be read: the run ends, or it is left out, into OUT/dropped.jsonl."""
    template: bool = True
    """Put plain prompts and completions into the chat template."""
    remat: common.RematName = "projections"
    """What the backward pass keeps, from least memory (full) to most (none)."""
    seed: int = 0
    """Random seed of the adapter's start, the order of the data, dropout, and what else is drawn."""
    resume: bool = False
    """Continue the run in --out from its newest sound checkpoint."""
    mesh: MeshConfig = MeshConfig()
    tensorboard: bool = False
    """Write scalars for TensorBoard to OUT/tensorboard."""
    wandb: str | None = None
    """Project to log to, if Weights & Biases is installed."""

    def peft_method(self) -> Peft | None:
        """The adapter's functions; None where every weight trains."""
        return None if self.full else self.peft.method()

    def rates(self, steps: int) -> optax.Schedule:
        """The learning rate at each of so many steps."""
        return self.schedule.schedule(self.learning_rate, steps, self.warmup)

    def optimizer(
        self, steps: int, model: Model, method: Peft | None
    ) -> optax.GradientTransformation:
        """The optimizer of so many steps, with the method's own part and what the dtypes need around it."""
        some = None if method is None or method.layers is None else method.layers(model.params)
        tx = self.optim.chain(self.rates(steps), self.weight_decay, self.clip, some)
        if method is not None and method.transform is not None:
            tx = method.transform(steps, tx)
        if self.dtype == "float16":
            tx = optim.with_loss_scale(tx)
        return (
            tx if self.param_dtype == "float32" else optim.with_stochastic_rounding(tx, self.seed)
        )

    def step(self, tx: optax.GradientTransformation, curvature: Loss | None) -> Step:
        """The jitted step.

        Args:
            tx: `optimizer(...)`.
            curvature: `losses.drawn(policy)` for optimizers that ask for it; None where the job's loss is
                not the likelihood of tokens.

        Raises:
            ValueError: an optimizer that needs a curvature, and none is there.
        """
        step = train.make_step(tx, accumulate=self.accumulate, gradient=self.optim.gradient_of())
        if curvature is not None:
            return functools.partial(step, curvature=curvature)
        self.optim.refuse_curvature()
        return step

    def plan(self, length: int) -> data.Plan:
        """How examples become batches of rows of this length."""
        return data.Plan(self.batch_size, length, common.PACKING[self.packing], self.seed)

    def check_method(self) -> None:
        """Tries the adapter on the shapes of the model alone, before anything large is read.

        Raises:
            ValueError: a target that no matrix has, a rank above a matrix's sides.
        """
        if (method := self.peft_method()) is not None:
            hf = read_config(self.model)
            params = abstract_params(Decoder(family(hf).config(hf), jnp.dtype(jnp.float32)))
            jax.eval_shape(method.init, jax.random.key(0), params)

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
        common.say(f"loading {self.model} ...")
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
    """Rows: a .jsonl, .json, .csv, .parquet file, hf:NAME[/CONFIG][@REVISION][:SPLIT], tfds:NAME[:SPLIT]."""
    adapter: Path | None = None
    """Go on with this adapter: its folder in PEFT's format, or that of the run that made it."""
    other_base: bool = False
    """Accept an --adapter that was trained on another base of the same shape."""
    eval_data: str | None = None
    """Held-out rows; their loss is reported."""
    save_every: int = 0
    """Steps between checkpoints; one at the end in any case."""
    keep: int = 3
    """Checkpoints kept."""
    eval_every: int = 0
    """Steps between evaluations; one at the end in any case."""
    stuck_after: float = 600.0
    """Seconds after which a step that has not ended is reported with the stack; 0 for never."""
