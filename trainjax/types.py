"""The contracts that every part of trainjax meets: batch, weight, loss, adapter method, checkpoint.

A reader who knows these five knows the library. Everything else is a pure function over them.
"""

from __future__ import annotations

import abc
import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from trainjax.sharing import scope

T = TypeVar("T")

Params = PyTree
"""A nested dict whose leaves are arrays or `Weight`s. A name is the keys joined by `/`."""

Metrics = dict[str, Array]
"""Scalars by name, each a weighted sum over the batch: micro-batches and devices add up."""

Batch = Mapping[str, Any]
"""Arrays by name, rows first. The keys that the library reads:

| key         | shape          | meaning                                                              |
|-------------|----------------|----------------------------------------------------------------------|
| `tokens`    | `[batch, seq]` | int32 token ids, padding included                                    |
| `segments`  | `[batch, seq]` | int32: 1, 2, ... for the examples packed in a row, 0 for padding     |
| `positions` | `[batch, seq]` | int32, restarts at 0 in every segment                                |
| `weights`   | `[batch, seq]` | float32 weight of the token *as a target*; sums to 1 over the batch  |
| `rows`      | `[batch, seq]` | int32, the row of the source a token comes from, -1 for padding      |
| `targets`   | `[batch, seq]` | int32, predicted in the place of `tokens` where a batch has them     |
| `adapters`  | `[batch]`      | int32: the adapter that a row goes through where there are several    |
|             |                | (`peft.switched`), from 0; -1 for the base without any               |
| `step`      | `[]`           | int32, optimizer steps done before; the training step puts it there  |

and where several completions of a prompt are compared, in groups of `size` (two, chosen first, in a pair):

| key           | shape                    | meaning                                                      |
|---------------|--------------------------|--------------------------------------------------------------|
| `completions` | `[batch, seq]`           | int32: `size * group + place + 1` for the tokens of a        |
|               |                          | completion *as targets*, 0 for others                        |
| `groups`      | `[batch, groups]`        | float32 weight of each group; sums to 1 over the batch       |
| `prefixes`    | `[batch, seq]`           | int32: another segment of the row that a token sees too, for |
|               |                          | completions that share their prompt's tokens; 0 for none     |
| `labels`      | `[batch, groups]`        | float32: 1 for a desirable completion, 0 for another         |
| `scores`      | `[batch, groups, size]`  | float32 score of each completion                             |
| `margins`     | `[batch, groups]`        | float32: by how much the chosen one is the better            |
| `reference_logprobs` | `[batch, seq]`    | float32 of tokens under the reference, computed beforehand   |
"""


@typing.dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are children of a pytree, those marked `static` part of its type.

    JAX rebuilds it without calling the constructor: while it transforms programs it puts placeholders
    where arrays were, and these have no shape that the constructor's types could accept.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(typing.cast(Any, cls))
    static = [field.name for field in fields if field.metadata.get("static")]
    names = [field.name for field in fields if field.name not in static]

    def flatten(node: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in names], tuple(
            getattr(node, name) for name in static
        )

    def flatten_with_keys(node: T) -> tuple[list[Any], tuple[Any, ...]]:
        children, fixed = flatten(node)
        keys = map(jax.tree_util.GetAttrKey, names)
        return list(zip(keys, children, strict=True)), fixed

    def unflatten(fixed: tuple[Any, ...], children: Iterable[Any]) -> T:
        node = object.__new__(cls)
        for name, value in [*zip(names, children, strict=True), *zip(static, fixed, strict=True)]:
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a `pytree` that jit compares instead of tracing: functions, sizes, names."""
    return dataclasses.field(default=default, metadata={"static": True})


class Weight(abc.ABC):
    """A leaf of the params that knows `x @ w`: a low-rank update, a quantised matrix, a pruned one.

    A subclass is a final `pytree` of arrays with the leading axes of the array that it
    stands for, so it passes through `nn.scan`, `jit`, `vmap` and sharding as that array does. Layers
    do not know which kind they hold.
    """

    @abc.abstractmethod
    def __rmatmul__(self, x: Array) -> Array:
        """`x @ w` for `x` of shape `[rows, in]`, computed and returned in x's dtype."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that it stands for, leading axes included."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """The matrix as an array in float32, leading axes included; for merging, not for training.

        Raises:
            ValueError: no matrix does what it does (it computes something that is not linear in x).
        """

    def reports(self, x: Array) -> Mapping[str, Array]:
        """What a penalty or a metric wants to know of a product with `x`, `[rows, in]`; by default nothing.

        An array each, rows first. Layers hand them on to who asks: `policies.Policy.reports`.
        """
        return {}

    def rows(self, take: Callable[[Array], Array]) -> Array:
        """`take(w)` for what takes rows of the matrix, such as the lookup of tokens in an embedding.

        By default of the dense matrix. A weight that is made of thinner parts takes theirs.

        Args:
            take: `(matrix) -> [..., columns]`, linear in the matrix and column by column.
        """
        return take(self.dense())

    def through(self, product: Callable[[Array, Array], Array], x: Array) -> Array:
        """`product(x, w)` for another product than `x @ w`, such as a convolution with w as its kernel.

        By default of the dense matrix, which is small beside what a convolution makes. A weight that
        is made of thinner parts goes through with these.

        Args:
            product: `(x, matrix) -> [..., columns]`, linear in the matrix and column by column.
            x: what it takes, such as images.
        """
        return product(x, self.dense().astype(x.dtype))


@pytree
class Frozen:
    """A part of an adapter, or of any params, that belongs to it and does not train.

    Projections that were drawn once, factors of the start, earlier adapters. The training step gives it
    neither gradient nor optimizer state, nor weight decay, and checkpoints and files hold it.

    Attributes:
        value: an array, or a pytree of them.
    """

    value: Any


class PeftFiles(NamedTuple):
    """An adapter in the format of the PEFT library.

    Attributes:
        fields: what `adapter_config.json` says.
        tensors: `<module>.lora_A.weight` and the like, without the prefix `base_model.model.`.
    """

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Peft(NamedTuple):
    """A parameter-efficient method as pure functions, in the manner of an Optax transform.

    Attributes:
        init: `(key, params) -> adapter`: the arrays that train, in float32, and `Frozen` ones beside them.
        attach: `(params, adapter, key=None) -> params`: the params of the forward pass. `key` turns
            on what is random in training (dropout). At init it computes the base's function.
        merge: `(params, adapter) -> params` with plain arrays, for export. A method whose function no
            weights have (prompts, routers) raises a ValueError that says so.
        export: `(adapter, modules) -> PeftFiles`, where `modules` names PEFT's module for each of
            our matrices. Its inverse is the function `from_peft` of the method's file.
        penalty: `(adapter, reports, rows) -> (scalar, metrics)`, a term that belongs to the method's
            loss (orthogonality, balance), or None; see `losses.adapter_penalty`. `reports` are what its
            weights report, `rows` the weight of each row in them.
        transform: `(steps, tx) -> optax.GradientTransformation`, the optimizer's whole chain `tx` with
            the method's own part around it, for a run of so many steps (learning rates of its own, a
            budget of ranks, which needs the gradients as well as the updates), or None.
        layers: `(params) -> numbers`, of a method whose stacks hold some of the base's layers: by name of
            an adapter's leaf those of its rows, or None for a leaf without; see `optim.grouped`.
    """

    init: Callable[[PRNGKeyArray, Params], Params]
    attach: Callable[..., Params]
    merge: Callable[[Params, Params], Params]
    export: Callable[[Params, Mapping[str, str]], PeftFiles]
    penalty: Callable[..., tuple[Array, Metrics]] | None = None
    transform: (
        Callable[[int, optax.GradientTransformation], optax.GradientTransformation] | None
    ) = None
    layers: Callable[[Params], Mapping[str, Sequence[int] | None]] | None = None


class Extras(NamedTuple):
    """Statistics that are computed only for a loss that asks; see `TokenStats` for what they are."""

    entropy: bool = False
    mean_logit: bool = False
    collision: bool = False


NO_EXTRAS = Extras()


class TokenStats(NamedTuple):
    """What a loss asks of each token's distribution. All are 0 at tokens that nobody asked for.

    Attributes:
        logprobs: `log p(target)`, differentiable.
        logsumexp: the log of the normaliser, differentiable (z-loss, label smoothing).
        correct: 1.0 where the target is the most probable token, else 0.0; no gradient.
        entropy: `-sum_k p_k log p_k` in nats, differentiable; None unless among the extras, as below.
        mean_logit: the mean of the logits over the vocabulary, differentiable, so that
            `logsumexp - mean_logit` is the cross-entropy of a uniform target (label smoothing).
        collision: `log sum_k p_k^2`, that two draws are the same token; no gradient (WPO's weights).
    """

    logprobs: Float[Array, "batch seq"]
    logsumexp: Float[Array, "batch seq"]
    correct: Float[Array, "batch seq"]
    entropy: Float[Array, "batch seq"] | None = None
    mean_logit: Float[Array, "batch seq"] | None = None
    collision: Float[Array, "batch seq"] | None = None


@runtime_checkable
class Policy(Protocol):
    """The policy of a loss: `policy(params, batch, key, where, extras) -> TokenStats`.

    What `tj.policy` makes meets it, and so does any pytree of a user's own that can be called like this:
    a wrapped Flax module, a table of bigrams. What it holds beside functions are inputs of the jitted step.
    """

    def __call__(
        self,
        params: Params,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        where: Bool[Array, "batch seq"] | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> TokenStats:
        """Statistics of the batch's own tokens (its `targets` where it has them), aligned with them.

        Args:
            params: what trains.
            batch: see `Batch`.
            key: turns on what is random in training.
            where: the tokens wanted; by default all.
            extras: further statistics that the loss asks for.
        """
        ...


@runtime_checkable
class SamplingPolicy(Policy, Protocol):
    """A policy that can draw: `draw(params, batch, key) -> tokens`, for losses on drawn labels."""

    def draw(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Int[Array, "batch seq"]:
        """A token drawn at each place, given the batch's own tokens before it."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A policy that shows its final states: `hidden(params, batch, key) -> [batch, seq, embed]`."""

    def hidden(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq embed"]:
        """Final hidden states, before the head."""
        ...


@runtime_checkable
class Reference(Protocol):
    """The frozen policy that a loss compares with: `reference(batch, where) -> TokenStats`, no gradient."""

    def __call__(self, batch: Batch, where: Bool[Array, "batch seq"] | None = None) -> TokenStats:
        """Statistics of the batch's own tokens; of those that `where` leaves out nothing is read."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """A reward model: `scorer(params, batch, key) -> [batch, groups, size]`, a number for each completion."""

    def __call__(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch groups size *objectives"]:
        """Scores of the completions of each group, with several objectives one of each on a last axis."""
        ...


@pytree
class Loss:
    """A loss with the arrays that it needs: `loss(params, batch, key) -> (scalar, metrics)`.

    A pytree, so base weights, references and coefficients are inputs of a jitted step and not
    constants in it: a new coefficient does not retrace. Losses compose: `dpo + 0.1 * sft + ewc`. The
    terms of a sum share the forward pass of a policy that several of them run.

    Attributes:
        fn: pure and module-level: `(inputs, params, batch, key) -> (scalar, metrics)`.
        inputs: a pytree of the arrays, policies or losses that `fn` needs.
    """

    fn: Callable[..., tuple[Array, Metrics]] = static()
    inputs: Any = ()

    def __call__(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Metrics]:
        with scope():
            return self.fn(self.inputs, params, batch, key)

    def __add__(self, other: Loss) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(_sum, (self, other))

    def __radd__(self, other: object) -> Loss:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum(losses)

    def __mul__(self, weight: ArrayLike) -> Loss:
        if isinstance(weight, Loss):
            return NotImplemented
        return Loss(
            _scale, (self, np.float32(weight) if isinstance(weight, int | float) else weight)
        )

    __rmul__ = __mul__

    def __hash__(self) -> int:
        raise TypeError(
            "a Loss is a pytree of arrays, the model's among them: give it to a jitted function as an "
            "argument, `jax.jit(lambda loss, params, batch: loss(params, batch))(loss, params, batch)`"
        )

    def named(self, name: str) -> Loss:
        """The same loss with `name/` before each of its metrics, for sums of two of a kind."""
        return Loss(_Prefix(name), self)


def _sum(losses: tuple[Loss, Loss], params, batch, key) -> tuple[Array, Metrics]:
    # One key for both: terms that run the same policy see the same dropout, and share its forward pass.
    (first, metrics), (second, more) = (loss(params, batch, key) for loss in losses)
    if both := sorted(metrics.keys() & more.keys()):
        raise ValueError(
            f"two terms of a loss report the metrics {both}; tell them apart with loss.named('...')"
        )
    return first + second, metrics | more


def _scale(inputs: tuple[Loss, ArrayLike], params, batch, key) -> tuple[Array, Metrics]:
    loss, weight = inputs
    value, metrics = loss(params, batch, key)
    return jnp.multiply(weight, value), metrics


@dataclasses.dataclass(frozen=True)
class _Prefix:
    name: str

    def __call__(self, loss: Loss, params, batch, key) -> tuple[Array, Metrics]:
        value, metrics = loss(params, batch, key)
        return value, {f"{self.name}/{key}": metric for key, metric in metrics.items()}


class Objective(NamedTuple):
    """What an optimizer may ask of a training step beyond the gradient: `objective` of its update.

    Everything is of the step's whole batch, over all devices and micro-batches; one micro-batch's worth is in
    memory at a time.

    Attributes:
        loss: `(trained, batch, key) -> (scalar, metrics)`, the step's loss of what trains.
        bind: `(loss) -> function` of the same kind, for another loss, such as one on drawn labels.
        total: `(fn) -> tree`: `fn(batch, key)` added up over the micro-batches. Every call hands them
            the same keys, so that two calls see the same dropout.
        key: of the step, for what the optimizer draws itself.
        scale: what `loss` is multiplied by (`optim.with_loss_scale`), and so its gradients.
    """

    loss: Callable[..., tuple[Array, Metrics]]
    bind: Callable[[Loss], Callable[..., tuple[Array, Metrics]]]
    total: Callable[[Callable[[Batch, PRNGKeyArray], Any]], Any]
    key: PRNGKeyArray
    scale: ArrayLike = 1.0


Gradient = Callable[[Objective, Params], tuple[Params, Metrics]]
"""`(objective, trained) -> (gradient, metrics)`, of which one is `loss`: how a step comes by its gradient."""


@pytree
class Blocks:
    """A matrix as a file holds it: numbers in blocks along the inputs, of so many bytes each.

    Attributes:
        data: rows (outputs) first.
        kind: the format's name in the file, `Q8_0` say.
    """

    data: UInt8[Array | np.ndarray, "out blocks bytes"]
    kind: str = static()


@runtime_checkable
class Checkpoint(Protocol):
    """A model's files as they come from the ecosystem, read one tensor at a time.

    Names and layouts are those of `transformers`: `model.layers.0.mlp.up_proj.weight` is `[out, in]`.
    """

    config: dict[str, Any]
    """The contents of `config.json` (made from the metadata where the format has none)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors by name, without reading them."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, on the host. Only this tensor is in memory."""
        ...

    def blocks(self, name: str) -> Blocks | None:
        """One tensor as it is stored, on the host, or None where it is stored as plain numbers."""
        ...

    def tokenizer(self) -> Any | None:
        """The `PreTrainedTokenizerFast`, with its chat template, or None where there is none."""
        ...
