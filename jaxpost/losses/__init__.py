"""The losses, as their papers write them: pure, per example, f32, unreduced. Needs jax alone.

Copy from here, or `from jaxpost.losses import dpo, PairLogps`. A name in a config (`loss.name`) is a key of the
tables `preference.LOSSES` and `sft.LOSSES`; its keyword arguments are its hyperparameters.
"""

from jaxpost.losses.preference import PairLogps, implicit_rewards, sigmoid
from jaxpost.losses.sft import dft, nll

dpo = sigmoid

__all__ = ["PairLogps", "dft", "dpo", "implicit_rewards", "nll", "sigmoid"]
