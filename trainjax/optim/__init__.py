"""Optimizers and schedules: Optax's own wherever it has them."""

from trainjax.optim import compression, norm_test, population
from trainjax.optim.average import AverageState, average_params
from trainjax.optim.chain import Chain, chain, clip_by_layer_norm, decayed
from trainjax.optim.contrib import eval_params, muon, prodigy, schedule_free, sharpness_aware
from trainjax.optim.eight_bit import EightBit, adamw_8bit, in_eight_bits, lion_8bit
from trainjax.optim.fira import FiraState, fira, galore, scale_by_fira
from trainjax.optim.groups import Group, Layers, grouped
from trainjax.optim.hft import HalfState, half_fine_tuning
from trainjax.optim.layerwise import layerwise_decay
from trainjax.optim.loss_scale import LossScaleState, with_loss_scale
from trainjax.optim.offload import offloaded
from trainjax.optim.private import privacy_epsilon, private
from trainjax.optim.rotation import RotationState, watch_rotation
from trainjax.optim.rounding import round_stochastically, with_stochastic_rounding
from trainjax.optim.schedules import (
    constant,
    cosine_restarts,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    range_test,
    refined,
    step_decay,
    warmup_cosine,
    wsd,
)
from trainjax.optim.sophia import (
    SophiaState,
    gauss_newton,
    hutchinson,
    scale_by_sophia,
    sophia,
    sophia_g,
    sophia_h,
)
from trainjax.optim.swats import SwatsState, swats
from trainjax.optim.zeroth_order import forward_gradient, two_point

__all__ = [
    "AverageState",
    "Chain",
    "EightBit",
    "FiraState",
    "Group",
    "HalfState",
    "Layers",
    "LossScaleState",
    "RotationState",
    "SophiaState",
    "SwatsState",
    "adamw_8bit",
    "average_params",
    "chain",
    "clip_by_layer_norm",
    "compression",
    "constant",
    "cosine_restarts",
    "decayed",
    "eval_params",
    "fira",
    "forward_gradient",
    "galore",
    "gauss_newton",
    "grouped",
    "half_fine_tuning",
    "hutchinson",
    "in_eight_bits",
    "inverse_sqrt",
    "layerwise_decay",
    "linear",
    "lion_8bit",
    "muon",
    "norm_test",
    "offloaded",
    "one_cycle",
    "polynomial",
    "population",
    "privacy_epsilon",
    "private",
    "prodigy",
    "range_test",
    "refined",
    "round_stochastically",
    "scale_by_fira",
    "scale_by_sophia",
    "schedule_free",
    "sharpness_aware",
    "sophia",
    "sophia_g",
    "sophia_h",
    "step_decay",
    "swats",
    "two_point",
    "warmup_cosine",
    "watch_rotation",
    "with_loss_scale",
    "with_stochastic_rounding",
    "wsd",
]
