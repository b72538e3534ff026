"""What the backward pass finds stored and what it computes again: policies for `Decoder.remat`.

Per token and layer, besides the layer's input (`embed` numbers):

| policy        | kept                                               | computed again                   |
|---------------|----------------------------------------------------|----------------------------------|
| `full`        | nothing                                            | the whole layer's forward pass   |
| `attention`   | attention's output and logsumexp                   | the projections                  |
| `projections` | every matrix product's output but the layer's last | norms, activations, rotations    |
| `offloaded`   | as `projections`, in the host's memory             | as `projections`                 |
| `None`        | all that autodiff asks for                         | nothing                          |
"""

from __future__ import annotations

import jax

_policies = jax.checkpoint_policies

full = _policies.nothing_saveable
attention = _policies.save_only_these_names("attention")
_PRODUCTS = ("query", "key", "value", "attention", "residual", "gate", "up")
projections = _policies.save_only_these_names(*_PRODUCTS)
offloaded = _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(_PRODUCTS),
    offload_src="device",
    offload_dst="pinned_host",
)
