"""Training: the state, the jitted step, checkpoints, and a loop that a user may copy."""

from trainjax.train.checkpoint import Checkpoints
from trainjax.train.combiners import Combiner, cagrad, gradnorm, mgda, pcgrad
from trainjax.train.fit import NotFinite, Stopped, evaluator, fit
from trainjax.train.state import TrainState, init
from trainjax.train.step import backpropagation, make_step

__all__ = [
    "Checkpoints",
    "Combiner",
    "NotFinite",
    "Stopped",
    "TrainState",
    "backpropagation",
    "cagrad",
    "evaluator",
    "fit",
    "gradnorm",
    "init",
    "make_step",
    "mgda",
    "pcgrad",
]
