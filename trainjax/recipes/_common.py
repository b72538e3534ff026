"""What recipes share: groups of flags, and the one place where names in flags meet functions."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import yaml

from trainjax import data, models, parallel, peft, quant, rollout
from trainjax.data import files
from trainjax.models import Model, load
from trainjax.nn import remat
from trainjax.recipes import Prose
from trainjax.text import whole
from trainjax.types import Params, Peft

DTYPES: Mapping[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}
PACKING: Mapping[str, data.Pack] = {"best-fit": data.best_fit, "none": data.unpacked}
BAD_ROWS: Mapping[str, files.OnUnreadable] = {"error": files.refused, "drop": files.kept}
TOO_LONG = {"truncate": data.truncate, "drop": data.drop, "error": data.refuse}
REMAT = {
    "full": remat.full,
    "attention": remat.attention,
    "projections": remat.projections,
    "offloaded": remat.offloaded,
    "none": None,
}
BASE_FORMATS: Mapping[str, quant.Format] = {
    "nf4": quant.nf4(double=True),
    "nf4-single": quant.nf4(double=False),
    "int8": quant.int8(),
    "fp8": quant.fp8(),
    "stored": quant.stored(),
}
WEIGHTS = {"token": data.token_mean, "sequence": data.sequence_mean}

DtypeName = Literal["float32", "bfloat16", "float16"]
ParamDtypeName = Literal["float32", "bfloat16"]
PackingName = Literal["best-fit", "none"]
BadRowsName = Literal["error", "drop"]
TooLongName = Literal["truncate", "drop", "error"]
RematName = Literal["full", "attention", "projections", "offloaded", "none"]
BaseFormatName = Literal["nf4", "nf4-single", "int8", "fp8", "stored"]


PEFT: Mapping[str, Callable[..., Peft]] = {
    "lora": peft.lora,
    "dora": peft.dora,
    "pissa": peft.pissa,
    "lora_plus": peft.lora_plus,
    "lora_fa": peft.lora_fa,
    "adalora": peft.adalora,
    "vera": peft.vera,
    "tied_lora": peft.tied_lora,
    "molora": peft.molora,
    "bottleneck": peft.bottleneck,
    "ia3": peft.ia3,
    "bitfit": peft.bitfit,
    "sparse": peft.sparse,
    "prompt": peft.prompt,
    "p_tuning": peft.p_tuning,
    "prefix": peft.prefix,
    "partial": peft.partial,
    "full": peft.full,
}
PeftName = Literal[
    *("lora", "dora", "pissa", "lora_plus", "lora_fa", "adalora", "vera", "tied_lora", "molora"),
    *("bottleneck", "ia3", "bitfit", "sparse", "prompt", "p_tuning", "prefix", "partial", "full"),
]


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The adapter. A setting that is not given is the method's own default."""

    name: PeftName = "lora"
    """The method."""
    rank: int | None = None
    """Inner size of a low-rank update (lora 16; adalora 8 in the mean, at the end; vera 256)."""
    alpha: float | None = None
    """Numerator of its scale, alpha / rank (lora 32)."""
    target: str | None = None
    """Regex of the matrices that get one, over names such as layers/attention/query/kernel; also
    q_proj,v_proj and all-linear."""
    dropout: float | None = None
    """On the update's input, in training (0)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    ratio: float | None = None
    """lora_plus: how many times A's learning rate B has (16)."""
    initial_rank: int | None = None
    """adalora: the rank of every matrix at first (half as much again)."""
    warmup: int | None = None
    """adalora: steps before the rank falls (0)."""
    final: int | None = None
    """adalora: last steps, in which it does not (0)."""
    every: int | None = None
    """adalora: steps between two choices of singular values (1)."""
    orthogonality: float | None = None
    """adalora: coefficient of its penalty (0.5)."""
    d_initial: float | None = None
    """vera: where the vector between the two projections begins (0.1)."""
    experts: int | None = None
    """molora: how many at each matrix (4)."""
    top_k: int | None = None
    """molora: experts that a token has; by default all, mixed."""
    balance: float | None = None
    """molora: coefficient of the penalty that keeps experts busy alike (0.01)."""
    bottleneck_size: int | None = None
    """bottleneck: width of the inner layer (64)."""
    activation: str | None = None
    """bottleneck: gelu, relu or silu."""
    add: bool | None = None
    """bitfit: give matrices a bias; by default where none of them has one."""
    density: float | None = None
    """sparse: share of each matrix's entries that trains, drawn at random (0.005)."""
    num_virtual_tokens: int | None = None
    """prompt, p_tuning, prefix: tokens before every example (20)."""
    prefix_projection: bool = False
    """prefix: make it by a small network, which is left out of the file."""
    encoder_hidden_size: int | None = None
    """p_tuning, prefix: width of that network (the model's)."""

    def method(self) -> Peft:
        """The adapter's functions.

        Raises:
            ValueError: a setting that the method does not have, or a value that it refuses.
        """
        return PEFT[self.name](**self.settings())

    def settings(self) -> dict[str, Any]:
        """The method's settings, those that were not given as its own defaults.

        Raises:
            ValueError: a setting that the method does not have.
        """
        parameters = inspect.signature(PEFT[self.name]).parameters
        known = {name: parameters[name].default for name in _SETTINGS if name in parameters}
        needed = [name for name, value in known.items() if value is inspect.Parameter.empty]
        values = {name: getattr(self, name) for name in _SETTINGS}
        given = {name: value for name, value in values.items() if value != _UNSET[name]}
        for name, value in given.items():
            if name not in known:
                raise ValueError(
                    f"{self.name} has no {name} (--peft.{name} {value}); its settings are "
                    f"{', '.join(known) or 'none'}"
                )
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{self.name} needs --peft.{missing[0]}")
        if "target" in given:
            given["target"] = target(given["target"])
        return known | given

    def resolved(self) -> PeftConfig:
        """The same with the method's defaults written out: what a run is known by."""
        return PeftConfig(name=self.name, **self.settings())


_MODULES = {
    "all-linear": peft.ALL_LINEAR,
    "q_proj": "attention/query/",
    "k_proj": "attention/key/",
    "v_proj": "attention/value/",
    "o_proj": "attention/output/",
    "gate_proj": "mlp/gate/",
    "up_proj": "mlp/up/",
    "down_proj": "mlp/down/",
}
"""Names of matrices in transformers and PEFT, and the regexes that they stand for here."""


def target(text: str) -> str:
    """The regex of a target, which may be or hold names that other libraries have.

    >>> target("q_proj,v_proj"), target("all-linear"), target("(q|k)_proj"), target("query|v_proj")
    ('attention/query/|attention/value/', '^layers/', '(q|k)_proj', 'query|attention/value/')
    """
    words = re.split(r"[,\s]+", text)
    if all(word in _MODULES for word in words):
        return "|".join(_MODULES[word] for word in words)
    return re.sub(r"\w+", lambda word: _MODULES.get(word[0], word[0]), text)


_UNSET = {field.name: field.default for field in dataclasses.fields(PeftConfig)}
_SETTINGS = [name for name in _UNSET if name != "name"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are used; their product is the number of devices, and -1 is what is left."""

    data: int = 1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = -1
    """Shards of every weight, each with its part of the batch."""
    tensor: int = 1
    """Shards of every matrix product."""
    sequence: int = 1
    """Shards of every row's tokens, for long rows."""
    expert: int = 1
    """Shards of a mixture's experts, each with its part of the batch."""
    slices: int | None = None
    """Groups of devices joined by a slow network, each with the whole model; by default TPU slices."""

    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of all devices."""
        return parallel.mesh(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How a model is asked; the settings that `generate` and `chat` have in common."""

    model: str
    """A hub id, a folder, a .gguf file, or a name that `trainjax fetch` knows."""
    adapter: Path | None = None
    """An adapter's folder in PEFT's format, or the folder of the run that made it."""
    system: Prose | None = None
    """System message; by default what the chat template has."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int | None = None
    """Draw from this many most probable tokens only."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens with this share of the probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the top token's probability."""
    stop: tuple[Prose, ...] = ()
    """Strings that end the answer."""
    seed: int = 0
    """Random seed of sampling."""
    dtype: DtypeName | None = None
    """Dtype of weights and arithmetic; by default as stored, and what the platform is fast at."""
    base_format: BaseFormatName | None = None
    """Keep the layers' matrices in fewer bits; stored is as a .gguf file has them."""

    def sampler(self) -> rollout.Sampler:
        """How tokens are drawn."""
        return rollout.sampler(self.temperature, self.top_k, self.top_p, self.min_p)

    def messages(self, *said: str) -> list[dict[str, str]]:
        """The beginning of a conversation: the system message, if any, and what the user said."""
        system = [] if self.system is None else [("system", self.system)]
        turns = [*system, *(("user", text) for text in said)]
        return [{"role": role, "content": whole(text)} for role, text in turns]


def load_model(
    name: str,
    *,
    dtype: DtypeName | None = None,
    adapter: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    remat: RematName = "full",
    base_format: BaseFormatName | None = None,
) -> Model:
    """A model as a flag names it; one dtype for weights and arithmetic, or what suits the platform."""
    kind = None if dtype is None else DTYPES[dtype]
    return load(
        name,
        mesh=mesh,
        dtype=kind,
        compute_dtype=kind,
        adapter=adapter,
        remat=REMAT[remat],
        quantise=None if base_format is None else BASE_FORMATS[base_format],
    )


def load_scorer(
    name: str,
    *,
    dtype: DtypeName | None = None,
    adapter: str | Path | None = None,
    other_base: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    base_format: BaseFormatName | None = None,
) -> tuple[Model, Peft | None, Params]:
    """A reward model as flags name it; see `load_model`."""
    kind = None if dtype is None else DTYPES[dtype]
    return models.load_scorer(
        name,
        mesh=mesh,
        dtype=kind,
        compute_dtype=kind,
        adapter=adapter,
        other_base=other_base,
        quantise=None if base_format is None else BASE_FORMATS[base_format],
    )


def save_config(config: Any, path: Path) -> None:
    """Writes a recipe's settings, all of them, as YAML that `--config` reads back."""
    if parallel.is_first():
        text = yaml.safe_dump(
            plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True
        )
        path.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Settings as YAML and JSON have them: paths as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the name of rows before what is wrong with them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def uncalled(*args: Any, **kwargs: Any) -> Any:
    """A policy, reference or scorer for a loss that is made only to have its numbers checked."""
    raise RuntimeError("a loss that was made to be checked was called")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, which are the same in all its processes."""
    names = ("trainjax", "jax", "jaxlib", "flax", "optax")
    return {name: importlib.metadata.version(name) for name in names}


def say(text: str) -> None:
    """A word to the user, beside the output proper; of several processes the first one says it."""
    if parallel.is_first():
        print(text, file=sys.stderr, flush=True)
