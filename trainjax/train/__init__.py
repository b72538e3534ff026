"""Training: the state, the jitted step, and a loop that a user may copy."""

from trainjax.train.state import TrainState, init
from trainjax.train.step import make_step

__all__ = ["TrainState", "init", "make_step"]
