"""Holds our losses against files of reference values: `python -m tests.parity.oracles DIR`.

DIR holds `NAME.npz` and `NAME.json` (inputs and cases; the json's `doc` says what is what). Each case is passed,
failed or missing (nothing of ours computes it yet). Prints `N passed, M failed` last (missing ones count as failed)
and exits 0 only if all passed.
"""

import inspect
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.losses import distill, kl, pairs, policy, preference, reward, sft, unpaired, value
from jaxpost.ops import masked
from jaxpost.ops.logprobs import Head, token_logps
from jaxpost.rl import advantages, rewards

TOLERANCE = 1e-6  # relative to the largest value of an output; 1e-6 absolute where that is below 1
CHECKS = {}


def check(run):
    CHECKS[run.__name__] = run
    return run


@check
def dpo(inputs, hyper):
    """Values and gradients of the summed and the per-token log-probabilities, as a mean over pairs."""
    if any(name not in preference.LOSSES for name in hyper["loss_type"]):
        return None
    logps = jnp.asarray(inputs["policy_per_token_logps"])
    mask = inputs["completion_mask"][:, 1:].astype(logps.dtype)
    count = len(mask) // 2
    halves = lambda x: (x[:count], x[count:])  # noqa: E731
    lengths = halves(mask.sum(1))
    index, both = mask.cumsum(1) - 1, [np.concatenate([length] * 2)[:, None] for length in lengths]
    ld_alpha = 1.0 if hyper["ld_alpha"] is None else hyper["ld_alpha"]
    weights = mask * pairs.ld_weights(index, *both, alpha=ld_alpha)
    summed = lambda per_token, weights: pairs.PairLogps(*halves((per_token * weights).sum(1)), *lengths)  # noqa: E731
    reference = summed(inputs["ref_per_token_logps"], weights)

    def loss(per_token):
        policy, total = summed(per_token, weights), 0.0
        wpo = jnp.ones(count)
        if hyper["use_weighting"]:
            wpo = pairs.wpo_weights(summed(per_token, mask), summed(inputs["log_sum_sq_probs"], mask))
        for name, weight in zip(hyper["loss_type"], hyper["loss_weights"], strict=True):
            loss_fn = preference.LOSSES[name]
            given = policy, reference
            if loss_fn.traits.any_divergence:
                kind = {"divergence": hyper["f_divergence_type"], "alpha": hyper["f_alpha_divergence_coef"]}
                given = pairs.with_divergence(*given, **kind), None
            values = loss_fn(*given, **hyperparameters(loss_fn, hyper | {"tau": hyper["discopop_tau"]}))
            share = lengths[0] / lengths[0].sum() if loss_fn.traits.per_token else 1 / count
            total += weight * (values * wpo * share).sum()
        return total

    value, grad = jax.value_and_grad(loss)(logps)
    first = halves(grad[np.arange(2 * count), mask.argmax(1)])
    return {
        "loss": value,
        "grad_policy_per_token": grad,
        **dict(zip(("grad_chosen_logps", "grad_rejected_logps"), first, strict=True)),
    }


def hyperparameters(loss, hyper):
    """Those that the loss takes. The reference ignores label_smoothing in `sigmoid`: comparable at 0 only."""
    takes = inspect.signature(loss).parameters
    return {k: v for k, v in hyper.items() if k in takes and (loss, k) != (preference.sigmoid, "label_smoothing")}


@check
def kto(inputs, hyper):
    mask, label = inputs["completion_mask"][:, 1:].astype(np.float64), np.array(hyper["labels"], np.float64)
    kl_mask = inputs["KL_completion_mask"][:, 1:].astype(np.float64)
    shifted = inputs["KL_policy_per_token_logps"] + hyper["kl_shift"]
    reference = (inputs["ref_per_token_logps"] * mask).sum(1)
    loss_fn = unpaired.LOSSES[hyper["loss_type"]]
    kl = jnp.zeros(())
    if loss_fn.baseline == "kl":
        kl = unpaired.kl((shifted * kl_mask).sum(1), (inputs["KL_ref_per_token_logps"] * kl_mask).sum(1))

    def loss(per_token):
        return loss_fn((per_token * mask).sum(1), reference, label, kl, **hyperparameters(loss_fn, hyper)).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(inputs["policy_per_token_logps"]))
    return {"loss": value, "grad_policy_per_token": grad, "kl": kl}


@check
def bco(inputs, hyper):
    """The running mean over the steps up to this one."""
    state = unpaired.Mean(jnp.zeros(()), jnp.zeros(()))
    names = ("chosen", "rejected")
    for step in range(hyper["step"] + 1):
        policy, reference = (
            [jnp.asarray(inputs[f"{who}_{name}"][step]) for name in names] for who in ("policy", "ref")
        )
        rewards = [hyper["beta"] * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True)]
        state = unpaired.reward_shift(state, jnp.concatenate(rewards))

    def losses(policy):
        label = jnp.concatenate([jnp.ones_like(policy[0]), jnp.zeros_like(policy[1])])
        joined = jnp.concatenate(policy), jnp.concatenate(reference)
        return unpaired.bco(*joined, label, state.value, **hyperparameters(unpaired.bco, hyper))

    grads = jax.grad(lambda policy: losses(policy).mean())(policy)
    values = losses(policy)
    return {
        "losses": values,
        "loss": values.mean(),
        "delta": state.value,
        **dict(zip(("grad_chosen", "grad_rejected"), grads, strict=True)),
    }


@check
def orpo(inputs, hyper):
    """The NLL is given there; the odds-ratio part is ours, and has the other sign there."""
    ours = reference_free(inputs, hyper, lambda pair: hyper["beta"] * preference.odds_ratio(pair), nll_weight=1.0)
    return ours | {"per_sequence_term": -ours["per_sequence_term"]}


@check
def cpo(inputs, hyper):
    """CPO's losses are those with a reference, given a uniform one; alpha shapes the reward as AlphaPO does."""
    name, beta, alpha = hyper["loss_type"], hyper["beta"], hyper["alpha"]

    def term(pair):
        if name == "simpo":
            given = {"gamma": hyper["simpo_gamma"], "label_smoothing": hyper["label_smoothing"]}
            return preference.alphapo(pair, beta=beta, alpha=alpha, **given)
        chosen, rejected = (preference.power(x, alpha) for x in (pair.chosen, pair.rejected))
        shaped = pairs.PairLogps(chosen, rejected, pair.chosen_tokens, pair.rejected_tokens)
        if name == "sigmoid":
            return preference.cpo(shaped, beta=beta, alpha=0.0, label_smoothing=hyper["label_smoothing"])
        return preference.LOSSES[name](shaped, None, beta=beta)

    return reference_free(inputs, hyper, term, nll_weight=hyper["cpo_alpha"])


def reference_free(inputs, hyper, term, nll_weight):
    """Loss, gradients and the per-pair part of a method whose log-probabilities are given as sums or as means."""
    given = [jnp.asarray(inputs[f"{hyper['logps_kind']}_{which}_logps"]) for which in ("chosen", "rejected")]

    def loss(chosen, rejected, nll):
        values = term(pairs.PairLogps(chosen, rejected, *[jnp.ones_like(chosen)] * 2))  # means: as if of one token
        return values.mean() + nll_weight * nll, values

    nll = jnp.asarray(inputs["nll_loss"])
    (value, values), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*given, nll)
    names = ("grad_chosen_logps", "grad_rejected_logps", "grad_nll")
    return {"loss": value, "per_sequence_term": values, **dict(zip(names, grads, strict=True))}


@check
def reward_(inputs, hyper):
    margin = jnp.asarray(inputs["margin"]) if hyper["margin"] else None
    centering = hyper["center_rewards_coefficient"] or 0.0

    def loss(rewards):
        chosen, rejected = jnp.split(rewards[:, 0], 2)
        return reward.bradley_terry(chosen, rejected, margin, centering=centering).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(inputs["rewards"]))
    return {"loss": value, "grad_rewards": grad}


@check
def ppo(inputs, hyper):
    """A rollout's rewards and advantages, then the loss of one minibatch.

    The reference takes the first padding place for a completion's last token: its score, its values and their loss lie
    on `longer`, a completion one token longer where there is room, its log-probabilities on `mask`, and where there are
    none it writes 1. It takes entropy and approximate KL as means over all places, padding too.
    """
    if "shift_mean" in hyper:
        return whitened(inputs, hyper)
    places = np.arange(inputs["responses"].shape[1])
    mask, longer = ((places <= inputs["sequence_lengths"][:, None] + more).astype(np.float64) for more in (0, 1))
    logps, reference = (np.where(mask, inputs[name], 1.0) for name in ("logprobs", "ref_logprobs"))
    values = np.where(longer, inputs["values"], 0.0)
    ended = (inputs["postprocessed_responses"] == 1).any(1)
    scores = rewards.penalize_missing_eos(inputs["scores"], ended, penalty=hyper["missing_eos_penalty"] or 0.0)
    kl_tokens = kl.KL_ESTIMATORS[hyper["kl_estimator"]](logps, reference)
    given = rewards.token_rewards(scores[:, None], kl_tokens, longer, kl_coef=hyper["kl_coef"])
    if hyper["whiten_rewards"]:
        given = masked.whiten(given, longer, shift_mean=False)
    gae = advantages.gae(given, values, masked.continues(longer), gamma=hyper["gamma"], lam=hyper["lam"])
    whitened_advantages, returns = masked.whiten(gae[0], mask), gae[1]
    rollout = {
        **{
            "padding_mask": mask == 0,
            "padding_mask_p1": longer == 0,
            "masked_logprobs": logps,
            "masked_values": values,
        },
        **{"kl": kl_tokens, "non_score_reward": -hyper["kl_coef"] * kl_tokens, "scores_after_penalty": scores},
        **{"rewards": given, "advantages": whitened_advantages, "returns": returns},
    }
    old = {"logps": logps, "values": values, "advantages": whitened_advantages, "returns": returns}
    return rollout | ppo_minibatch(inputs, hyper, old, mask, longer)


def whitened(inputs, hyper):
    """The reference whitens what lies outside the mask too."""
    x, mask = inputs["whiten_x"], inputs["whiten_mask"].astype(np.float64)
    mean, variance = masked.moments(x, mask)
    outside = (x - mean) / jnp.sqrt(variance + masked.EPSILON) + (0 if hyper["shift_mean"] else mean)
    ours = masked.whiten(x, mask, shift_mean=hyper["shift_mean"])
    return {"y": np.where(mask, ours, outside), "mean": mean, "var": variance}


def ppo_minibatch(inputs, hyper, old, mask, longer):
    """Loss, gradients and diagnostics."""
    context, responses = inputs["queries"].shape[1], inputs["responses"]
    mean = lambda x, mask: (x * mask).sum() / mask.sum()  # noqa: E731
    clip = {"epsilon_low": hyper["cliprange"], "epsilon_high": hyper["cliprange"]}
    clip_values = {"clip_range": hyper["cliprange_value"]}

    def loss(logits, new_values):
        logps = jax.nn.log_softmax(logits[:, context - 1 : -1] / (hyper["temperature"] + 1e-7))
        chosen = jnp.take_along_axis(logps, responses[..., None], axis=-1)[..., 0]
        chosen = jnp.where(mask > 0, chosen, 1.0)
        predicted = jnp.where(longer > 0, new_values[:, context - 1 : -1, 0], 0.0)
        log_ratios = chosen - old["logps"]
        both, of_values = (log_ratios, old["advantages"]), (predicted, old["values"], old["returns"])
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        said = {
            **{"new_logprobs": chosen, "vpred": predicted, "ratio": policy.ratios(log_ratios)},
            "pg_loss": mean(policy.ppo(*both, **clip), mask),
            "pg_clipfrac": mean(policy.is_clipped(*both, **clip), mask),
            "vf_loss": mean(value.squared_error(*of_values, **clip_values), longer),
            "vf_clipfrac": mean(value.is_clipped(*of_values, **clip_values), longer),
            "approxkl": kl.k2(chosen, old["logps"]).mean(),
            **{"per_token_entropy": entropy, "entropy": entropy.mean()},
        }
        said["loss"] = said["pg_loss"] + hyper["vf_coef"] * said["vf_loss"]
        return said["loss"], said

    grads, said = jax.grad(loss, (0, 1), has_aux=True)(inputs["new_logits"], inputs["new_values"])
    return said | dict(zip(("grad_logits", "grad_values"), grads, strict=True))


@check
def grpo_is_correction(inputs, hyper):
    level, outside = hyper["mode"].split("_")
    log_ratios = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
    if level == "sequence":
        log_ratios = log_ratios.sum(1, keepdims=True)
    limits = {"low": hyper["clip_min"], "high": hyper["clip_max"]}
    return {"ratio": policy.importance_weights(log_ratios, outside=outside, **limits)}


@check
def grpo_advantages(inputs, hyper):
    given, weights = inputs[hyper["input"]], hyper["reward_weights"]
    groups = np.arange(len(given)) // hyper["num_generations"]
    if hyper["multi_objective_aggregation"] == "normalize_then_sum":
        return {"advantages": advantages.decoupled(given, weights, groups)}
    summed = advantages.combined(given, weights)
    return {"advantages": advantages.group_relative(summed, groups, scale=hyper["scale_rewards"])}


@check
def rloo(inputs, hyper):
    """The KL is in the reward, of whole completions; the loss is PPO's, of whole completions too."""
    mask = inputs["completion_mask"].astype(np.float64)
    if "num_generations" in hyper:
        given = inputs["rewards_per_func"].sum(1).astype(np.float64)
        if hyper["reward_clip_range"]:
            given = given.clip(*hyper["reward_clip_range"])
        given -= hyper["beta"] * (kl.k1(inputs["old_per_token_logps"], inputs["ref_per_token_logps"]) * mask).sum(1)
        found = advantages.leave_one_out(given, np.arange(len(given)) // hyper["num_generations"])
        return {"advantages": advantages.normalized(found) if hyper["normalize_advantages"] else found}
    clip = {"epsilon_low": hyper["epsilon"], "epsilon_high": hyper["epsilon_high"]}

    def loss(logps):
        return policy.ppo((logps * mask).sum(1) - inputs["old_logps"], inputs["advantages"], **clip).mean()

    value, grad = jax.value_and_grad(loss)(inputs["per_token_logps"])
    return {"loss": value, "grad_per_token_logps": grad}


@check
def grpo(inputs, hyper):
    """One family: losses of log-ratios per token or completion, three kinds of mean.

    Those over the tokens of the step are given whole, the others as parts of an accumulated step.
    """
    mask = (inputs["completion_mask"] * (inputs["tool_mask"] if hyper["tool_mask"] else 1)).astype(np.float64)
    lengths, per_completion = mask.sum(1, keepdims=True), hyper["importance_sampling_level"] == "sequence"
    of_completions = lambda x: (x * mask).sum(1, keepdims=True) / np.maximum(lengths, 1)  # noqa: E731
    given, kind = inputs["advantages"][:, None], hyper["loss_type"]
    corrections = inputs[f"is_ratio_{hyper['is_ratio']}"] if hyper["is_ratio"] else np.ones((1, 1))
    entropy_mask = policy.high_entropy_mask(inputs["entropies"], mask, share=hyper["top_entropy_quantile"])

    def loss(logps, entropies):
        old = inputs["old_per_token_logps"] if hyper["old_logps"] else jax.lax.stop_gradient(logps)
        log_ratios = of_completions(logps - old) if per_completion else logps - old
        if kind == "vespo":  # the correction is part of its weight
            shift = np.log(corrections) if hyper["is_ratio"] else 0.0
            losses = policy.vespo(((logps - old + shift) * mask).sum(1, keepdims=True), given, logps)
        else:
            losses = family(kind, log_ratios, given, logps, hyper) * corrections
        if hyper["off_policy_mask_threshold"] is not None:
            left = of_completions(logps - inputs["sampling_per_token_logps"])
            losses *= policy.off_policy_mask(left, given, threshold=hyper["off_policy_mask_threshold"])
        if hyper["top_entropy_quantile"] < 1:
            losses *= entropy_mask
        if hyper["beta"]:
            correction = policy.ratios(log_ratios) if hyper["use_bias_correction_kl"] else 1.0
            losses += hyper["beta"] * kl.k3(logps, inputs["ref_per_token_logps"]) * correction
        bonus = hyper["entropy_coef"] * policy.token_mean(entropies, mask).value
        accumulated = 1 if kind in ("dapo", "cispo", "vespo") else hyper["ga"]
        return family_mean(kind, losses, mask, lengths, hyper) / accumulated - bonus

    value, grads = jax.value_and_grad(loss, (0, 1))(inputs["per_token_logps"], inputs["entropies"])
    return {"loss": value, "grad_per_token_logps": grads[0], "grad_entropies": grads[1]}


def family(kind: str, log_ratios, given, logps, hyper):
    """Losses of one of GRPO's relatives."""
    if kind == "cispo":
        return policy.cispo(log_ratios, given, logps, ratio_high=hyper["epsilon_high"])
    if kind == "sapo":
        temperatures = [hyper[f"sapo_temperature_{sign}"] for sign in ("pos", "neg")]
        return policy.sapo(
            log_ratios, given, temperature_positive=temperatures[0], temperature_negative=temperatures[1]
        )
    clip = {"epsilon_low": hyper["epsilon"], "epsilon_high": hyper["epsilon_high"], "dual_clip": hyper["delta"]}
    return policy.ppo(log_ratios, given, **clip)


def family_mean(kind: str, losses, mask, lengths, hyper):
    """The mean that goes with a loss."""
    if kind in ("grpo", "sapo"):
        return policy.completion_mean(losses, mask, lengths, len(mask)).value
    if kind == "dr_grpo":
        return policy.constant_mean(losses, mask, len(mask), length=hyper["max_completion_length"]).value
    if kind == "luspo":
        return policy.constant_mean(losses, mask, len(mask), length=1).value
    return policy.token_mean(losses, mask).value


@check
def distill_(inputs, hyper):
    mask = (inputs["labels"] != -100).astype(np.float64)
    teacher = distill.logps(jnp.asarray(inputs["teacher_logits"]), temperature=hyper["temperature"])

    def loss(logits):
        student = distill.logps(logits, temperature=hyper["temperature"])
        return (distill.jsd(student, teacher, beta=hyper["beta"]) * mask).sum() / mask.sum()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(inputs["student_logits"]))
    return {"loss": value, "grad_student_logits": grad}


@check
def sft_(inputs, hyper):
    labels, logits = inputs["labels"][:, 1:], jnp.asarray(inputs["logits"])
    if hyper["loss_type"] not in sft.LOSSES:
        return None
    mask = labels != -100
    items = float(hyper["num_items_in_batch"] or mask.sum())

    def loss(logits):
        logps = jax.nn.log_softmax(logits[:, :-1])
        logps = jnp.take_along_axis(logps, np.where(mask, labels, 0)[..., None], axis=-1)[..., 0]
        return (sft.LOSSES[hyper["loss_type"]](logps) * mask.astype(logits.dtype)).sum() / items

    value, grad = jax.value_and_grad(loss)(logits)
    return {"loss": value, "grad_logits": grad}


@check
def fused_lm_head(inputs, hyper):
    bias = inputs["bias"] if hyper["bias"] else None

    def weighted(hidden, weight, bias):
        head = Head(weight, bias, scale=hyper["logit_scale"], soft_cap=hyper["softcap"])
        targets = inputs["labels"].astype(np.int32)[None]
        stats = token_logps(hidden[None], head, targets, temperature=hyper["temperature"], chunk=5)
        stats = jax.tree.map(lambda x: x[0], stats)
        return (inputs["cot_log_probs"] * stats.logps + inputs["cot_entropy"] * stats.entropy).sum(), stats

    arguments = (0, 1, 2) if hyper["bias"] else (0, 1)
    grads, stats = jax.grad(weighted, arguments, has_aux=True)(inputs["hidden"], inputs["weight"], bias)
    names = ("grad_hidden", "grad_weight", "grad_bias")
    return {
        "log_probs": stats.logps,
        "entropy": stats.entropy,
        "log_sum_sq_probs": stats.log_sum_sq_probs,
        "mean_logits": stats.mean_logit,
        "is_top1": stats.is_top1,
        **dict(zip(names, grads, strict=False)),
    }


def check_file(path: pathlib.Path) -> dict[str, str]:
    """Verdict per case of one file: "passed", "missing" or what differs."""
    case_file, values = json.loads(path.with_suffix(".json").read_text()), np.load(path)
    inputs = {name: values[name] for name in values.files if "/" not in name}
    run = CHECKS.get(path.stem) or CHECKS.get(f"{path.stem}_")  # of the name of a module of losses
    return {case["id"]: verdict(run, inputs, case, values) for case in case_file["cases"]}


def verdict(run, inputs, case, values) -> str:
    ours = run and run(inputs, case["hyper"])
    if not ours:
        return "missing"
    if unchecked := set(case["outputs"]) - set(ours):
        return f"failed: nothing computes {sorted(unchecked)}"
    for name in case["outputs"]:
        expected = values[f"{case['id']}/{name}"].astype(np.float64)
        error = np.abs(np.asarray(ours[name], np.float64) - expected)
        if not error.max() <= TOLERANCE * max(1, np.abs(expected).max()):
            return f"failed: {name} is off by {error.max():.2e}"
    return "passed"


def main(folder: str) -> int:
    jax.config.update("jax_enable_x64", True)
    counts = {"passed": 0, "failed": 0, "missing": 0}
    for path in sorted(pathlib.Path(folder).glob("*.npz")):
        if not path.with_suffix(".json").exists():
            continue
        for case, said in check_file(path).items():
            counts[said.split(":")[0]] += 1
            print(f"{path.stem}/{case} {said}")
    failed = counts["failed"] + counts["missing"]
    print(f"{counts['missing']} of the failed are missing: nothing of ours computes them yet")
    print(f"{counts['passed']} passed, {failed} failed")
    return 0 if counts["passed"] and not failed else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.parity.oracles DIR")
    sys.exit(main(sys.argv[1]))
