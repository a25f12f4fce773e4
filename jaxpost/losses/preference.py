"""Preference losses. Each takes the log-probabilities of P pairs and returns one value per pair, f32[P].

To add one: write a function `(policy, reference, *, hyperparameters) -> f32[P]` and decorate it with `@preference`,
where a loss that reads no reference says so (`Traits`).

Throughout, y_w is the chosen and y_l the rejected answer to x, r(x, y) = beta * log(pi(y | x) / pi_ref(y | x)) the
implicit reward, h = r(x, y_w) - r(x, y_l) the margin, sigma the logistic function. `reference=None` is a uniform
reference: r = beta * log pi.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxpost.losses.pairs import PairLogps, implicit_rewards, log_ratios, means, smoothed

if TYPE_CHECKING:
    from jaxtyping import Float

LOSSES = {}  # name in a config -> function


@dataclasses.dataclass(frozen=True)
class Traits:
    """What the caller of a loss must know besides its values.

    reads_reference: False spares the reference model. reads_margin: it needs `policy.margin`. any_divergence:
    `with_divergence` may come before it. per_token: its mean is over the chosen tokens, not over pairs. mean_rewards:
    it compares mean, not summed, log-probabilities, and so do the rewards that are logged.
    """

    reads_reference: bool = True
    reads_margin: bool = False
    any_divergence: bool = False
    per_token: bool = False
    mean_rewards: bool = False


def preference(loss=None, **traits: bool):
    """Makes `loss` known to configs by its name; `traits` as in `Traits`."""

    def add(loss):
        loss.traits = Traits(**traits)
        LOSSES[loss.__name__] = loss
        return loss

    return add if loss is None else add(loss)


def traits_of(loss) -> Traits:
    """Those of a loss, also with hyperparameters bound; the defaults where it was never decorated."""
    return getattr(getattr(loss, "func", loss), "traits", Traits())


# --- against a reference ----------------------------------------------------------------------------------------------


@preference(any_divergence=True)
def sigmoid(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """DPO: -log sigma(h).

    With label_smoothing e, conservative DPO: -(1 - e) log sigma(h) - e log sigma(-h), for labels that are wrong
    with probability e in [0, 0.5).

    Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, equation 7.
    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", equation 3.

    >>> same = PairLogps(chosen=jnp.array([-5.0]), rejected=jnp.array([-7.0]))
    >>> print(sigmoid(same, same, beta=0.1))  # policy = reference: ln 2
    [0.6931472]
    """
    chosen, rejected = log_ratios(policy, reference)
    return smoothed(beta * (chosen - rejected), label_smoothing)


@preference(any_divergence=True, mean_rewards=True)
def sigmoid_norm(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """Length-normalised DPO: -log sigma(r_w / |y_w| - r_l / |y_l|).

    Lambert et al. 2024, "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv:2411.15124, equation 6.

    >>> policy = PairLogps(jnp.array([4.0]), jnp.array([-1.0]), jnp.array([2.0]), jnp.array([1.0]))
    >>> print(sigmoid_norm(policy, None, beta=1.0))  # -log sigma(4 / 2 + 1)
    [0.04858735]
    """
    chosen, rejected = means(policy, *log_ratios(policy, reference))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


@preference(any_divergence=True, reads_margin=True)
def odpo(
    policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, alpha: float = 1.0, log_offset: bool = True
) -> "Float[Array, 'P']":
    """ODPO, DPO with an offset: -log sigma(h - alpha * log(s_w - s_l)), s the scores that the data give.

    Needs `policy.margin` = s_w - s_l > 0. log_offset=False takes the difference itself, not its logarithm.
    Amini et al. 2024, "Direct Preference Optimization with an Offset", arXiv:2402.10571, equations 6 and 7.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]), margin=jnp.array([1.0]))
    >>> print(odpo(same, same), odpo(same, same, log_offset=False))  # ln 2 ; -log sigma(-1)
    [0.6931472] [1.3132617]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    return smoothed(chosen - rejected - alpha * (jnp.log(policy.margin) if log_offset else policy.margin))


@preference(any_divergence=True, mean_rewards=True)
def ipo(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """IPO: (d - 1 / (2 beta))^2, d the difference of the log-ratios, here of their means over tokens.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arXiv:2310.12036, equation 17 (beta is its tau; its authors divide by the lengths, as TRL does on their word).

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]), jnp.array([2.0]), jnp.array([3.0]))
    >>> print(ipo(same, same, beta=0.5))  # (0 - 1)^2
    [1.]
    """
    chosen, rejected = means(policy, *log_ratios(policy, reference))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@preference(any_divergence=True)
def hinge(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """SLiC as a DPO loss: max(0, 1 - h).

    Zhao et al. 2023, "SLiC-HF", arXiv:2305.10425, equation 1, on DPO's margin as in Liu et al. 2023, "Statistical
    Rejection Sampling Improves Preference Optimization", arXiv:2309.06657, equation 10.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(hinge(same, same))
    [1.]
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.relu(1 - beta * (chosen - rejected))


@preference(any_divergence=True)
def robust(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """Robust DPO: (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2 e), unbiased where labels flip with probability e.

    Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv:2403.00409,
    equation 12.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(robust(same, same, label_smoothing=0.1))
    [0.6931472]
    """
    chosen, rejected = log_ratios(policy, reference)
    margin, e = beta * (chosen - rejected), label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(margin) + e * jax.nn.log_sigmoid(-margin)) / (1 - 2 * e)


@preference(any_divergence=True)
def exo_pair(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> "Float[Array, 'P']":
    """EXO on pairs: KL((sigma(h), sigma(-h)) || (1 - e, e)), the reverse KL to the smoothed label; e > 0.

    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", arXiv:2402.00856, equation 16.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(exo_pair(same, same, label_smoothing=0.5))  # both are (1/2, 1/2)
    [0.]
    """
    chosen, rejected = log_ratios(policy, reference)
    log_w, log_l = jax.nn.log_sigmoid(beta * (chosen - rejected)), jax.nn.log_sigmoid(beta * (rejected - chosen))
    label_w, label_l = math.log1p(-label_smoothing), math.log(label_smoothing)
    return jnp.exp(log_w) * (log_w - label_w) + jnp.exp(log_l) * (log_l - label_l)


@preference
def nca_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """NCA on pairs: -log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2, so that y_w does not fall with y_l.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv:2402.05369,
    equation 14.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(nca_pair(same, same))  # 2 ln 2
    [1.3862944]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    log_sigmoid = jax.nn.log_sigmoid
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@preference
def bco_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """BCO on pairs, without reward shift: -log sigma(r_w) - log sigma(-r_l). With the shift: `unpaired.bco`.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656, equation 8.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(bco_pair(same, same))  # 2 ln 2
    [1.3862944]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


@preference
def sppo_hard(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """SPPO, winning probabilities 1 and 0: (d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2, d = log(pi / pi_ref).

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", arXiv:2405.00675, equation 4.7
    (beta is 1 / eta).

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(sppo_hard(same, same, beta=0.5))  # 1 + 1
    [2.]
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@preference
def apo_zero(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """APO-zero: 1 - sigma(r_w) + sigma(r_l): y_w up, y_l down. For y_w better than what the model gives.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv:2408.06266,
    equation 7.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(apo_zero(same, same))
    [1.]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


@preference
def apo_down(policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """APO-down: sigma(r_w) + 1 - sigma(h): both down, y_l more. For y_w worse than what the model gives.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(apo_down(same, same))
    [1.]
    """
    chosen, rejected = implicit_rewards(policy, reference, beta=beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


@preference(any_divergence=True)
def discopop(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> "Float[Array, 'P']":
    """DiscoPOP (log-ratio modulated loss): (1 - s) * -log sigma(h) + s * exp(-h), s = sigma(h / tau).

    Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models",
    arXiv:2406.08414, equation 5.

    >>> same = PairLogps(jnp.array([-5.0]), jnp.array([-7.0]))
    >>> print(discopop(same, same))  # (ln 2 + 1) / 2
    [0.8465736]
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = beta * (chosen - rejected)
    mix = jax.nn.sigmoid(margin / tau)
    return -(1 - mix) * jax.nn.log_sigmoid(margin) + mix * jnp.exp(-margin)


@preference
def aot(
    policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Float[Array, 'P']":
    """AOT on pairs: -log sigma(beta * d), d the sorted margins of the policy less the sorted ones of the reference.

    A statistic of the microbatch: the k-th smallest margin meets the k-th smallest. Values lie where the policy's do.
    Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv:2406.05882,
    equation 8 (paired).

    >>> same = PairLogps(jnp.array([-5.0, -3.0]), jnp.array([-7.0, -9.0]))
    >>> print(aot(same, same))
    [0.6931472 0.6931472]
    """
    ours = policy.chosen - policy.rejected
    theirs = jnp.zeros_like(ours) if reference is None else reference.chosen - reference.rejected
    return _by_rank(ours, theirs, policy, lambda a, b: smoothed(beta * (a - b), label_smoothing))


@preference
def aot_unpaired(
    policy: PairLogps, reference: PairLogps | None, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Float[Array, 'P']":
    """AOT unpaired: -log sigma(beta * d), d the sorted log-ratios of all y_w less the sorted ones of all y_l.

    A statistic of the microbatch, as `aot`. Values lie where those of y_w do.
    Melnyk et al. 2024, arXiv:2406.05882, equation 8 (unpaired).

    >>> policy = PairLogps(jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0]))
    >>> print(aot_unpaired(policy, None))  # sorted, they are equal
    [0.6931472 0.6931472]
    """
    chosen, rejected = log_ratios(policy, reference)
    return _by_rank(chosen, rejected, policy, lambda a, b: smoothed(beta * (a - b), label_smoothing))


def _by_rank(one, other, policy: PairLogps, loss):
    """loss(k-th smallest of `one`, of `other`), put where `one` has it; pairs without tokens come last."""
    empty = jnp.zeros(one.shape, bool) if policy.chosen_tokens is None else policy.chosen_tokens == 0
    order, other_order = (jnp.argsort(jnp.where(empty, jnp.inf, x)) for x in (one, other))
    return jnp.zeros_like(one).at[order].set(loss(one[order], other[other_order]))


# --- without a reference ----------------------------------------------------------------------------------------------


@preference(reads_reference=False, per_token=True)
def sft(policy: PairLogps, reference: PairLogps | None = None) -> "Float[Array, 'P']":
    """-log pi(y_w | x) / |y_w|: the term added to others in RPO and MPO; its mean is over the chosen tokens.

    Nvidia 2024, "Nemotron-4 340B", arXiv:2406.11704, section 3.3.2; Pang et al. 2024, "Iterative Reasoning
    Preference Optimization", arXiv:2404.19733, equation 1; Wang et al. 2024 (MPO), arXiv:2411.10442, equation 2.

    >>> print(sft(PairLogps(jnp.array([-6.0]), jnp.array([-7.0]), jnp.array([3.0]), jnp.array([2.0]))))
    [2.]
    """
    return -means(policy, policy.chosen, policy.rejected)[0]


@preference(reads_reference=False, mean_rewards=True)
def simpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """SimPO: -log sigma(beta * (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - gamma).

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734,
    equation 6.

    >>> pair = PairLogps(jnp.array([-2.0]), jnp.array([-6.0]), jnp.array([2.0]), jnp.array([3.0]))
    >>> print(simpo(pair, beta=2.0, gamma=2.0))  # 2 * (-1 + 2) - 2 = 0
    [0.6931472]
    """
    return alphapo(policy, beta=beta, gamma=gamma, alpha=0.0, label_smoothing=label_smoothing)


@preference(reads_reference=False, mean_rewards=True)
def alphapo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 0.25,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """AlphaPO: -log sigma(beta * (u(y_w) - u(y_l)) - gamma), u(y) = (1 - p(y)^-alpha) / alpha, log p(y) = log pi / |y|.

    SimPO at alpha 0. Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment", arXiv:2501.03884,
    equation 4.

    >>> pair = PairLogps(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([1.0]), jnp.array([1.0]))
    >>> print(alphapo(pair, beta=1.0, gamma=2.0, alpha=1.0))  # (1 - 2) - (1 - 4) - 2 = 0
    [0.6931472]
    """
    chosen, rejected = (power(mean, alpha) for mean in means(policy, policy.chosen, policy.rejected))
    return smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def power(logp, alpha: float):
    """(1 - p^-alpha) / alpha, which tends to log p as alpha tends to 0 (AlphaPO's reward)."""
    return logp if alpha == 0 else -jnp.expm1(-alpha * logp) / alpha


@preference(reads_reference=False)
def cpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> "Float[Array, 'P']":
    """CPO: -log sigma(beta * (log pi(y_w|x) - log pi(y_l|x))) - alpha * log pi(y_w|x) / |y_w|.

    Xu et al. 2024, "Contrastive Preference Optimization", arXiv:2401.08417, equation 5, its NLL as a mean over tokens.

    >>> same = PairLogps(jnp.array([-6.0]), jnp.array([-6.0]), jnp.array([3.0]), jnp.array([3.0]))
    >>> print(cpo(same))  # ln 2 + 2
    [2.6931472]
    """
    return sigmoid(policy, None, beta=beta, label_smoothing=label_smoothing) + alpha * sft(policy)


@preference(reads_reference=False, mean_rewards=True)
def orpo(policy: PairLogps, reference: PairLogps | None = None, *, beta: float = 0.1) -> "Float[Array, 'P']":
    """ORPO: -log pi(y_w|x) / |y_w| + beta * (odds-ratio loss); beta is the paper's lambda.

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691, equation 6.

    >>> pair = PairLogps(jnp.array([-2.0]), jnp.array([-2.0]), jnp.array([2.0]), jnp.array([2.0]))
    >>> print(orpo(pair, beta=0.1))  # 1 + 0.1 ln 2
    [1.0693147]
    """
    return sft(policy) + beta * odds_ratio(policy)


@preference(reads_reference=False, mean_rewards=True)
def odds_ratio(policy: PairLogps, reference: PairLogps | None = None) -> "Float[Array, 'P']":
    """-log sigma(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), log p = log pi(y | x) / |y|.

    Hong et al. 2024, arXiv:2403.07691, equation 7.

    >>> same = PairLogps(jnp.array([-2.0]), jnp.array([-3.0]), jnp.array([2.0]), jnp.array([3.0]))
    >>> print(odds_ratio(same))  # p = 1/e for both
    [0.6931472]
    """
    log_odds = lambda logp: logp - jnp.log(-jnp.expm1(jnp.minimum(logp, -1e-7)))  # noqa: E731  p < 1 in f32
    chosen, rejected = map(log_odds, means(policy, policy.chosen, policy.rejected))
    return smoothed(chosen - rejected)
