"""Holds our losses against files of reference values: `python -m tests.parity.oracles DIR`.

DIR holds `NAME.npz` and `NAME.json` (inputs and cases; the json's `doc` says what is what). Each case is passed,
failed or missing (nothing of ours computes it yet). Prints `N passed, M failed` last (missing ones count as failed)
and exits 0 only if all passed.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.losses import preference, sft
from jaxpost.ops.logprobs import Head, token_logps

TOLERANCE = 1e-6  # relative to the largest value of an output; 1e-6 absolute where that is below 1
CHECKS = {}


def check(run):
    CHECKS[run.__name__] = run
    return run


@check
def dpo(inputs, hyper):
    """Values and gradients of the summed and the per-token log-probabilities, as a mean over pairs."""
    name = hyper["loss_type"][0]
    plain = {
        "loss_weights": ([1.0],),
        "ld_alpha": (None, 1.0),
        "f_divergence_type": ("reverse_kl",),
        "use_weighting": (False,),
    }
    if name not in preference.LOSSES or any(hyper[k] not in values for k, values in plain.items()):
        return None
    loss_fn, logps = preference.LOSSES[name], jnp.asarray(inputs["policy_per_token_logps"])
    mask = inputs["completion_mask"][:, 1:].astype(logps.dtype)
    pairs = len(mask) // 2
    reference = preference.PairLogps(*split_sums(inputs["ref_per_token_logps"] * mask))

    def loss(per_token):
        policy = preference.PairLogps(*split_sums(per_token * mask))
        # the reference ignores label_smoothing in `sigmoid`: comparable at 0 only
        return loss_fn(policy, reference, beta=hyper["beta"]).mean()

    value, grad = jax.value_and_grad(loss)(logps)
    first = grad[np.arange(2 * pairs), mask.argmax(1)]
    return {
        "loss": value,
        "grad_policy_per_token": grad,
        "grad_chosen_logps": first[:pairs],
        "grad_rejected_logps": first[pairs:],
    }


def split_sums(per_token):
    sums = per_token.sum(1)
    return sums[: len(sums) // 2], sums[len(sums) // 2 :]


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
    run = CHECKS.get({"sft": "sft_"}.get(path.stem, path.stem))
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
