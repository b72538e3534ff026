"""The gated feed-forward layer of the Llama family."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from trainjax.nn.dense import Dense


class SwiGlu(nn.Module):
    """`down(silu(gate(x)) * up(x))`.

    Attributes:
        features: size of the hidden layer.
        use_bias: whether the three projections have a bias.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        gate = checkpoint_name(Dense(self.features, self.use_bias, name="gate")(x), "gate")
        up = checkpoint_name(Dense(self.features, self.use_bias, name="up")(x), "up")
        hidden = nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return Dense(x.shape[-1], self.use_bias, name="down")(hidden.astype(x.dtype))
