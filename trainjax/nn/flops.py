"""How many floating-point operations training takes, for MFU and plans."""

from __future__ import annotations

from trainjax.nn.decoder import DecoderConfig


def flops_per_token(
    config: DecoderConfig,
    *,
    context: float,
    adapter_size: int = 0,
    full: bool = False,
    targets: float = 1.0,
) -> float:
    """FLOPs that one step of training needs for each real token; recomputation does not count.

    With N the weights of a layer's matrices over all layers, H the head's, A the adapter's, a product
    of a token with n weights takes 2n, forward and again backward, and again for a trained weight's
    gradient: `4 N + 4 targets H + 6 A` with frozen weights, `6 N + 6 targets H` in full training.
    Attention adds `12 layers heads head_dim context`: scores and values, `2 heads head_dim context`
    each, forward once and backward twice.

    Args:
        config: the architecture.
        context: tokens that a token attends to, on average: half its example's length.
        adapter_size: numbers in the adapter.
        full: whether all weights train.
        targets: fraction of the tokens that go through the head.
    """
    c = config
    layers = c.num_layers * layer_weights(c)
    head = targets * c.hidden_size * c.vocab_size
    attending = 12 * c.num_layers * c.num_heads * c.head_dim * context
    return (6 if full else 4) * (layers + head) + 6 * adapter_size + attending


def layer_weights(config: DecoderConfig) -> int:
    """Numbers in the matrices of one layer."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return attention + 3 * c.hidden_size * c.intermediate_size
