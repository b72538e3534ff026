"""How much memory and recomputation training takes on an accelerator, from the architecture alone.

For plans: an accelerator's kernels keep other arrays than the compiler for CPUs, which casts products to
float32 and has no fused attention. The counts follow the table in `nn.remat`.
"""

from __future__ import annotations

import dataclasses

from trainjax.nn.decoder import DecoderConfig
from trainjax.nn.flops import layer_weights
from trainjax.ops.head import Tile


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a step holds on one device beside weights and optimizer, in bytes, and what it repeats.

    Attributes:
        kept: activations from the forward pass to the backward pass.
        working: arrays of the layer, or of the head, that is being computed; the larger of the two.
        traffic: bytes of activations that pass through the memory.
        repeated: FLOPs for each token that are spent on computing forward passes again.
    """

    kept: float
    working: float
    traffic: float
    repeated: float


def footprint(
    config: DecoderConfig,
    remat: str,
    *,
    rows: float,
    length: int,
    parts: int = 1,
    tensor: int = 1,
    width: int = 2,
    gathered: int = 1,
    trained: bool = False,
    head: Tile,
) -> Footprint:
    """The footprint of one device.

    Args:
        config: the architecture.
        remat: a name of the table in `nn.remat`; `none` for no recomputation.
        rows: of a micro-batch on the device.
        length: tokens of a row.
        parts: devices that share a row. Each has the keys and values of all of it for a while.
        tensor: devices that share the heads and hidden units.
        width: bytes of a number in compute.
        gathered: layers whose matrices are whole at a time, in the width of compute: 2 where the next one
            is being fetched from other devices.
        trained: whether the head trains: its gradient is added up before it goes to where its shards are.
        head: what goes through it at once; of the vocabulary all where devices share it.

    Raises:
        KeyError: a remat policy that is not in the table.
    """
    c, tokens = config, rows * length / parts
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    embed, hidden = c.hidden_size, c.intermediate_size
    logsumexp = 4 * c.num_heads / tensor
    attention = width * queries / tensor + logsumexp
    projections = attention + width * (embed + (queries + 2 * keys + 2 * hidden) / tensor)
    # Autodiff keeps both norms' outputs, the last product's input, silu's inputs and outputs in float32.
    everything = projections + width * (2 * embed - hidden / tensor) + 4 * 4 * hidden / tensor
    per_token = {
        "full": 0.0,
        "attention": attention,
        "projections": projections,
        "offloaded": 0.0,
        "none": everything,
    }[remat]
    kept = tokens * c.num_layers * (width * embed + per_token)
    matrices = layer_weights(c)
    # Recomputed products, the stream and its gradient in float32, three gradients of the hidden layer.
    layer = tokens * (projections + 2 * 4 * embed + 3 * width * hidden / tensor)
    if parts > 1:  # whole rows' keys and values, and their gradients in float32
        layer += rows * length * 2 * (width + 4) * keys / tensor
    weights = gathered * width * matrices / tensor
    entries = min(head.entries, c.vocab_size) if tensor == 1 else c.vocab_size / tensor
    logits = 3 * 4 * min(head.tokens, tokens) * entries
    states = tokens * embed * (4 + 3 * width)
    whole = (width + 4 * trained) * embed * c.vocab_size / tensor if gathered > 1 else 0.0
    passes = 2 if remat in ("none", "projections", "offloaded") else 3
    again = 2 * (matrices - embed * hidden)  # nothing asks for the last product's output
    repeated = {"full": again + 2 * queries * length, "attention": again}.get(remat, 0.0)
    return Footprint(
        kept=kept,
        working=max(layer + weights, states + logits + whole),
        traffic=2 * kept + 2 * passes * c.num_layers * tokens * projections,
        repeated=float(c.num_layers * repeated),
    )
