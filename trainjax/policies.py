"""A policy: a model and what trains on it, as the pure functions that losses ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trainjax import axes, platform, sharing, tree
from trainjax.derivatives import own_gradient
from trainjax.models import Model
from trainjax.nn import Decoder, head
from trainjax.ops.blocked import Branches
from trainjax.ops.draw import draw
from trainjax.ops.fold import fold
from trainjax.ops.head import Head, Tied, tile
from trainjax.ops.vocab import token_stats
from trainjax.peft.switched import chosen
from trainjax.types import NO_EXTRAS, Batch, Extras, Params, Peft, TokenStats, pytree, static


@pytree
class Policy:
    """`policy(params, batch) -> TokenStats`: a token's log-probability given those before it.

    A pytree around the frozen weights, which a jitted step so takes as inputs.

    Attributes:
        base: frozen weights that the adapter goes on; None where the params are the whole model.
        module: the Flax module.
        peft: how the adapter is attached; None in full fine-tuning and for a plain model.
    """

    base: Params | None
    module: Decoder = static()
    peft: Peft | None = static(None)

    def __call__(
        self,
        params: Params | None,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        where: Bool[Array, "batch seq"] | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> TokenStats:
        """Log-probabilities of the batch's own tokens.

        Args:
            params: the adapter, the full params, or None for the base alone.
            batch: `tokens`, and `segments` and `positions` if rows are packed. If it has `targets`,
                `[batch, seq]`, these are predicted in the place of the tokens, after the same context.
                `adapters` tells which of several adapters a row goes through (`peft.switched`); the base
                alone has none.
            key: turns dropout on.
            where: the tokens wanted; the head does no work for others. By default all.
            extras: further statistics: entropy, mean logit, collision.

        Returns:
            Stats aligned with `tokens`: entry `[b, t]` is of `tokens[b, t]`. The first token of a
            row is nobody's target: its entry is 0.
        """
        weights, hidden, _ = self._forward(params, batch, key)
        targets = batch.get("targets", batch["tokens"])
        where = jnp.ones(targets.shape, bool) if where is None else where
        folded = fold(self.module.mesh, *targets.shape)
        stats = token_stats(
            folded(hidden),
            self._head(weights),
            folded(_shifted(targets)),
            folded(_shifted(where).at[:, -1].set(False)),
            groups=folded.groups,
            chunk=tile(jax.default_backend()).tokens,
            vocab_block=self._vocab_block(),
            extras=extras,
        )
        return jax.tree.map(lambda stat: jnp.roll(folded.undo(stat), 1, axis=1), stats)

    def draw(
        self, params: Params | None, batch: Batch, key: PRNGKeyArray
    ) -> Int[Array, "batch seq"]:
        """A token drawn from the policy at each place, given the batch's own tokens before it.

        For the batch's `targets`. The first token of a row is nobody's target and stays.
        """
        weights, hidden, _ = self._forward(params, batch)
        tokens = batch["tokens"]
        drawn = draw(key, hidden, self._head(weights), vocab_block=self._vocab_block())
        return jnp.roll(drawn, 1, axis=1).at[:, 0].set(tokens[:, 0])

    def attached(self, params: Params | None, key: PRNGKeyArray | None = None) -> Params:
        """The weights of the forward pass: base and adapter, or whichever there is."""
        if params is None:
            return self.base
        if self.peft is None:
            return params
        # Methods are written for float32; an adapter may be kept in bfloat16 between steps.
        wide = jax.tree.map(tree.wide, tree.trainable(params))
        return self.peft.attach(self.base, tree.with_trained(params, wide), key)

    def hidden(
        self, params: Params | None, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq embed"]:
        """Final hidden states, for losses and heads that do not go through the vocabulary."""
        return self._forward(params, batch, key)[1]

    def reports(
        self, params: Params | None, batch: Batch, key: PRNGKeyArray | None = None
    ) -> dict[str, Array]:
        """What the weights report of the forward pass, by name: `[layers, batch * seq, ...]` each.

        A router's probabilities, say; see `Weight.reports`. Of the forward pass that the policy's other
        functions run.
        """
        return tree.flatten(self._forward(params, batch, key)[2])

    def _head(self, weights: Params) -> Head:
        """The output head, whole on each device but for `tensor`, in the dtype of the arithmetic.

        Shared over `fsdp` it would be fetched anew for each chunk of tokens that goes through it, and as
        often its gradient be added up over the devices.
        """
        mesh, output = self.module.mesh, head(self.module.config, weights)
        matrix = output.embedding if isinstance(output, Tied) else output
        if mesh is None or mesh.size == 1 or not isinstance(matrix, jax.Array):
            return output
        sides = ("tensor", "fsdp") if isinstance(output, Tied) else ("fsdp", "tensor")
        shared = [
            side if size % axes.length(mesh, side) == 0 else None
            for side, size in zip(sides, matrix.shape, strict=True)
        ]
        whole = [side if side == "tensor" else None for side in shared]
        narrow = min(matrix.dtype, self.module.dtype, key=lambda dtype: jnp.dtype(dtype).itemsize)
        matrix = _fetched(
            matrix.astype(narrow), NamedSharding(mesh, P(*shared)), NamedSharding(mesh, P(*whole))
        )
        return Tied(matrix) if isinstance(output, Tied) else matrix

    def _vocab_block(self) -> int | None:
        """Entries of the vocabulary at once: all of them where devices share it."""
        is_shared = axes.length(self.module.mesh, "tensor") > 1
        return None if is_shared else tile(jax.default_backend()).entries

    def _forward(
        self, params: Params | None, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Params, Array, Params]:
        """The weights, the hidden states and what weights report, which the terms of a loss share."""
        names = ("tokens", "positions", "segments", "prefixes", "adapters")
        read = {name: batch[name] for name in names if name in batch}
        return sharing.once(_forward, self, params, read, key)


def _forward(
    policy: Policy, params: Params | None, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Params, Array, Params]:
    weights, tokens = policy.attached(params, key), batch["tokens"]
    folded = fold(policy.module.mesh, *tokens.shape)
    if "adapters" in batch and params is not None:
        of_tokens = jnp.broadcast_to(batch["adapters"][:, None], tokens.shape)
        weights = chosen(weights, folded(of_tokens)[:, 0])
    positions = batch.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = batch.get("segments")
    if segments is not None and "prefixes" in batch:
        segments = Branches(segments, batch["prefixes"])
    (hidden, _), reported = policy.module.apply(
        {"params": weights}, tokens, positions, segments, mutable=["reports"]
    )

    def in_order(report: Array) -> Array:
        layers, _, *rest = report.shape
        rows = report.reshape(layers, len(tokens) * folded.parts, -1, *rest)
        return jax.vmap(folded.undo)(rows).reshape(report.shape)

    reports = reported.get("reports", {})
    return weights, hidden, jax.tree.map(in_order, reports) if folded.parts > 1 else reports


@own_gradient(nondiff_argnums=(1, 2))
def _fetched(matrix: Array, shared: NamedSharding, whole: NamedSharding) -> Array:
    """The matrix laid out as `whole`; its gradient goes back to where its shards are.

    Both layouts are said, or the compiler would fetch what the matrix was cast from.
    """
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(matrix, shared), whole)


def _fetched_fwd(matrix: Array, shared: NamedSharding, whole: NamedSharding) -> tuple[Array, None]:
    return _fetched(matrix, shared, whole), None


def _fetched_bwd(shared: NamedSharding, whole: NamedSharding, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, shared),)


_fetched.defvjp(_fetched_fwd, _fetched_bwd)


def policy(model: Model, method: Peft | None = None) -> Policy:
    """The policy that trains: `method`'s adapter on the model, or the whole model without one."""
    return Policy(None if method is None else model.params, model.module, method)


@pytree
class Reference:
    """`reference(batch) -> TokenStats`: a frozen policy, with nothing random and no gradient."""

    policy: Policy
    params: Any = None

    def __call__(
        self,
        batch: Batch,
        where: Bool[Array, "batch seq"] | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> TokenStats:
        return jax.lax.stop_gradient(self.policy(self.params, batch, where=where, extras=extras))

    def updated(self, params: Params, mixup: ArrayLike = 1.0) -> Reference:
        """TR-DPO: the reference moved to `mixup * params + (1 - mixup) * its own`, every k-th step.

        Of the same structure, so the step goes on with it and is not compiled anew; of an adapter the
        factors are mixed.

        Args:
            params: the policy's, as they are now.
            mixup: 1 takes them over, less goes part of the way (`ref_model_mixup_alpha` in TRL).

        Raises:
            ValueError: a reference that has no params of its own; a mixup outside [0, 1].

        Source: Gorbatovski et al. 2024, arXiv:2404.09656, eq. 1-2.
        """
        if self.params is None:
            raise ValueError(
                "this reference is the base itself and stays; one that moves is made by "
                "reference(model, lora, adapter)"
            )
        if isinstance(mixup, int | float) and not 0 <= mixup <= 1:
            raise ValueError(f"mixup={mixup} is a share of the policy's params, from 0 to 1")
        return Reference(self.policy, _mixed(self.params, params, mixup))


@platform.jit
def _mixed(old: Params, new: Params, mixup: ArrayLike) -> Params:
    return jax.tree.map(lambda a, b: (a + mixup * (b - a)).astype(a.dtype), old, new)


def reference(model: Model, method: Peft | None = None, params: Params | None = None) -> Reference:
    """A frozen policy as the reference: by default the model itself, the policy's own base.

    Args:
        model: its weights are not copied.
        method: how an adapter is attached.
        params: an adapter for it, or without a method whole weights; copied, since a training step
            takes away the arrays of the state that it is given.

    Raises:
        ValueError: a method without params.
    """
    if params is None:
        if method is not None:
            raise ValueError(
                "a reference with an adapter needs the adapter: reference(model, lora, params)"
            )
        return Reference(Policy(model.params, model.module))
    base = None if method is None else model.params
    return Reference(Policy(base, model.module, method), jax.tree.map(jnp.copy, params))


@pytree
class CachedReference:
    """`reference(batch) -> TokenStats` of log-probabilities that the data carry: no forward pass.

    See `data.with_reference`. Of the stats there are the log-probabilities alone.
    """

    def __call__(self, batch: Batch, where: Bool[Array, "batch seq"] | None = None) -> TokenStats:
        if "reference_logprobs" not in batch:
            raise ValueError(
                f"the batch has no reference_logprobs, only {', '.join(batch)}; data.with_reference "
                "computes them"
            )
        logprobs = batch["reference_logprobs"]
        logprobs = logprobs if where is None else jnp.where(where, logprobs, 0.0)
        nothing = jnp.zeros_like(logprobs)
        return TokenStats(logprobs, nothing, nothing)


def reference_logprobs(reference: Reference) -> Callable[[Batch], Float[Array, "batch seq"]]:
    """`(batch) -> logprobs` of the targets, jitted; what `data.with_reference` calls.

    Targets are the tokens of all completions, and where a batch compares none those that are trained on.
    """
    return functools.partial(_logprobs, reference)


@platform.jit
def _logprobs(reference: Reference, batch: Batch) -> Float[Array, "batch seq"]:
    targets = batch["completions"] > 0 if "completions" in batch else batch["weights"] != 0
    return reference(batch, where=targets).logprobs


def _shifted(x: Array) -> Array:
    return jnp.roll(x, -1, axis=1)
