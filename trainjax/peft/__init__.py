"""Parameter-efficient methods, one file each: `Peft(init, attach, merge, export)` and `from_peft`."""

from trainjax.peft.lora import ALL_LINEAR, Lora, lora

__all__ = ["ALL_LINEAR", "Lora", "lora"]
