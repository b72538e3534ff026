"""Losses: array maths that can be read alone, and functions that wire a policy into a `Loss`."""

from trainjax.losses.adapter import adapter_penalty
from trainjax.losses.combine import at, ensemble, on, scheduled, uncertainty, with_log_variances
from trainjax.losses.continual import (
    Anchored,
    ewc,
    key_entries,
    l2_sp,
    lwf,
    o_lora,
    pooled,
    reg_lora,
)
from trainjax.losses.drawn import drawn
from trainjax.losses.kto import kto
from trainjax.losses.policy import cispo, grpo, gspo, ppo, reinforce
from trainjax.losses.preference import dpo, pairwise
from trainjax.losses.ranking import listwise
from trainjax.losses.reward import bradley_terry
from trainjax.losses.reweight import (
    hard_self_paced,
    hardest,
    lin_upper,
    reweigh,
    reweighted,
    skill_weights,
    soft_self_paced,
    top_k,
)
from trainjax.losses.sft import dco, dft, reward_weighted, sft, unlikelihood

__all__ = [
    "adapter_penalty",
    "at",
    "Anchored",
    "bradley_terry",
    "cispo",
    "dco",
    "dft",
    "dpo",
    "drawn",
    "ensemble",
    "ewc",
    "grpo",
    "gspo",
    "hard_self_paced",
    "hardest",
    "key_entries",
    "kto",
    "l2_sp",
    "lin_upper",
    "listwise",
    "lwf",
    "o_lora",
    "on",
    "pairwise",
    "pooled",
    "ppo",
    "reg_lora",
    "reinforce",
    "reweigh",
    "reward_weighted",
    "reweighted",
    "scheduled",
    "sft",
    "skill_weights",
    "soft_self_paced",
    "top_k",
    "uncertainty",
    "unlikelihood",
    "with_log_variances",
]
