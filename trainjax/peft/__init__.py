"""Parameter-efficient methods, one file each: `Peft(init, attach, merge, export)` and `from_peft`."""

from trainjax.peft._matrices import ALL_LINEAR
from trainjax.peft.bitfit import Biased, bitfit
from trainjax.peft.bottleneck import HOULSBY, PFEIFFER, Bottleneck, bottleneck
from trainjax.peft.ia3 import Ia3, ia3
from trainjax.peft.lora import Lora, lora
from trainjax.peft.partial import full, partial, trained_layers
from trainjax.peft.sparse import Sparse, sparse
from trainjax.peft.unfreezing import grow, last_first, unfreezing

__all__ = [
    "ALL_LINEAR",
    "HOULSBY",
    "PFEIFFER",
    "Biased",
    "Bottleneck",
    "Ia3",
    "Lora",
    "Sparse",
    "bitfit",
    "bottleneck",
    "full",
    "grow",
    "ia3",
    "last_first",
    "lora",
    "partial",
    "sparse",
    "trained_layers",
    "unfreezing",
]
