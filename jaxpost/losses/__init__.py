"""The losses, as their papers write them: pure, per example, f32, unreduced. Needs jax alone.

Copy from here, or `from jaxpost.losses import dpo, PairLogps`. A name in a config (`loss.name`) is a key of the table
`LOSSES` of the stage's module: `sft`, `preference`, `unpaired`, `reward`, `policy`, `distill`; its keyword arguments
are its hyperparameters.
"""

from jaxpost.losses import distill, kl, pairs, policy, preference, reward, sft, unpaired, value
from jaxpost.losses.pairs import PairLogps, implicit_rewards, ld_weights, with_divergence, wpo_weights
from jaxpost.losses.policy import ppo
from jaxpost.losses.preference import sigmoid
from jaxpost.losses.sft import dft, nll

dpo = sigmoid

__all__ = [
    "PairLogps",
    "dft",
    "distill",
    "dpo",
    "implicit_rewards",
    "kl",
    "ld_weights",
    "nll",
    "pairs",
    "policy",
    "ppo",
    "preference",
    "reward",
    "sft",
    "sigmoid",
    "unpaired",
    "value",
    "with_divergence",
    "wpo_weights",
]
