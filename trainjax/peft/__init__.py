"""Parameter-efficient methods, one file each: `Peft(init, attach, merge, export)` and `from_peft`."""

from trainjax.peft._matrices import ALL_LINEAR
from trainjax.peft.adalora import adalora
from trainjax.peft.beside import beside
from trainjax.peft.bitfit import Biased, bitfit
from trainjax.peft.bottleneck import HOULSBY, PFEIFFER, Bottleneck, bottleneck
from trainjax.peft.columns import columns
from trainjax.peft.combined import combined, together
from trainjax.peft.dora import Dora, dora
from trainjax.peft.ia3 import Ia3, ia3
from trainjax.peft.lora import Lora, lora
from trainjax.peft.lora_fa import lora_fa
from trainjax.peft.lora_plus import lora_plus
from trainjax.peft.molora import MoLora, molora
from trainjax.peft.p_tuning import p_tuning
from trainjax.peft.partial import full, partial, trained_layers
from trainjax.peft.pissa import pissa, residual
from trainjax.peft.prefix import prefix
from trainjax.peft.prompt import prompt
from trainjax.peft.sparse import Sparse, sparse
from trainjax.peft.switched import Switched, stacked, switched
from trainjax.peft.tied_lora import tied_lora
from trainjax.peft.unfreezing import grow, last_first, unfreezing
from trainjax.peft.vera import Vera, vera

__all__ = [
    "ALL_LINEAR",
    "HOULSBY",
    "PFEIFFER",
    "Biased",
    "Bottleneck",
    "Dora",
    "Ia3",
    "Lora",
    "MoLora",
    "Sparse",
    "Switched",
    "Vera",
    "adalora",
    "beside",
    "bitfit",
    "bottleneck",
    "columns",
    "combined",
    "dora",
    "full",
    "grow",
    "ia3",
    "last_first",
    "lora",
    "lora_fa",
    "lora_plus",
    "molora",
    "p_tuning",
    "partial",
    "pissa",
    "prefix",
    "prompt",
    "residual",
    "sparse",
    "stacked",
    "switched",
    "tied_lora",
    "together",
    "trained_layers",
    "unfreezing",
    "vera",
]
