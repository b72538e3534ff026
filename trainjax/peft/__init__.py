"""Parameter-efficient methods, one file each: `Peft(init, attach, merge, export)` and `from_peft`."""

from trainjax.peft._matrices import ALL_LINEAR
from trainjax.peft.lora import Lora, lora

__all__ = ["ALL_LINEAR", "Lora", "lora"]
