"""Methods against forgetting, for tasks that are learned one after another.

A method is a `Method`: a few pure functions around what it remembers. A file holds a family of them;
to add one, write a function that returns a `Method`.
"""

from trainjax.continual.distillation import lwf
from trainjax.continual.halves import hft
from trainjax.continual.low_rank import o_lora, reg_lora
from trainjax.continual.method import Learned, Method, in_turn
from trainjax.continual.quadratic import ewc, l2_sp, mas, online_ewc, si
from trainjax.continual.rows import joint, replay, sequential

__all__ = [
    "Learned",
    "Method",
    "ewc",
    "hft",
    "in_turn",
    "joint",
    "l2_sp",
    "lwf",
    "mas",
    "o_lora",
    "online_ewc",
    "reg_lora",
    "replay",
    "sequential",
    "si",
]
