"""Holds our models against reference checkpoints: `python -m tests.parity.checkpoints DIR`.

Each folder DIR/*/ with a golden.npz is a tiny checkpoint and what transformers computes of it (eager f32): ids, mask
and position_ids padded on the right and on the left, logits, the last hidden state, a greedy continuation, NLL, the
embedding's gradient and the norm of all gradients. Where there is a config_legacy.json (older RoPE keys) it must read
as the same model. Prints a verdict a folder and `N passed, M failed` last, in which a missing family counts as failed;
exits 0 only if all passed.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.errors import CheckpointError
from jaxpost.models.hf import load_params, read_config
from jaxpost.models.policy import Policy
from jaxpost.ops.experts import balance_loss
from jaxpost.ops.logprobs import logits, row_logps
from jaxpost.types import Rows
from tests.models.tiny import greedy, linear_rows

TOLERANCE = 1e-4  # absolute on logits and the like; relative on the gradients
CHECKED = {  # values of a golden.npz that are compared (or are inputs)
    *(
        f"{name}_{side}"
        for name in ("input_ids", "attention_mask", "position_ids", "logits")
        for side in ("right", "left")
    ),
    "hidden_last_right",
    "greedy_left",
    "nll_right",
    "grad_embed_right",
    "grad_norm_right",
    "aux_loss_right",
    "rewards_right",
    "rewards_left",
}
ROUTER = "router_logits_right_"  # and the number of the MoE layer


def check(folder: pathlib.Path) -> str:
    """ "passed", "missing (why)" or "failed (what differs)"."""
    golden = np.load(folder / "golden.npz")
    if unknown := sorted(n for n in golden.files if n not in CHECKED and not n.startswith(ROUTER)):
        return f"missing (nothing of ours computes {', '.join(unknown)})"
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return f"missing ({error})"
    legacy = folder / "config_legacy.json"
    if legacy.exists() and read_config(folder, legacy.name) != config:
        return "failed (config_legacy.json reads as another model)"
    policy = Policy(config)
    differences = compare(policy, load_params(folder, policy), golden)
    wrong = [f"{name} off by {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE]
    return f"failed ({', '.join(wrong)})" if wrong else "passed"


def compare(policy: Policy, params, golden) -> dict[str, float]:
    """The largest difference of each quantity, where the mask is 1."""
    if policy.config.num_scores:
        return {f"rewards_{side}": reward_error(policy, params, golden, side) for side in ("right", "left")}
    found = {}
    for side in ("right", "left"):
        rows = golden_rows(golden, side)
        hidden, router = jax.jit(policy.hidden)(params, rows)
        real = golden[f"attention_mask_{side}"] == 1
        found[f"logits_{side}"] = np.abs(
            logits(hidden[real], policy.head(params)) - golden[f"logits_{side}"][real]
        ).max()
        if side == "right":
            found["hidden_last"] = np.abs(hidden - golden["hidden_last_right"])[real].max()
            found |= router_errors(policy, router, golden, real)

    def nll(params):
        stats = row_logps(policy.hidden(params, rows)[0], policy.head(params), rows)
        return -stats.logps.sum() / rows.weights.sum()

    rows = golden_rows(golden, "right")
    value, grads = jax.jit(jax.value_and_grad(nll))(params)
    norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
    embed = golden["grad_embed_right"]
    found["nll"] = abs(float(value) - float(golden["nll_right"]))
    found["grad_norm"] = abs(float(norm) / float(golden["grad_norm_right"]) - 1)
    found["grad_embed"] = np.abs(grads["embed"]["weight"] - embed).max() / np.abs(embed).max()
    found["greedy"], found["greedy_logps"] = greedy_errors(policy, params, golden)
    return found


def golden_rows(golden, side: str) -> Rows:
    mask = golden[f"attention_mask_{side}"].astype(np.int32)
    tokens, positions = (golden[f"{name}_{side}"].astype(np.int32) for name in ("input_ids", "position_ids"))
    predicted = mask * np.roll(mask, 1, axis=1)
    predicted[:, 0] = 0
    return Rows(tokens, mask, np.zeros_like(mask), positions, predicted.astype(np.float32))


def reward_error(policy: Policy, params, golden, side: str) -> float:
    """The scores at the last real token of each row."""
    mask = golden[f"attention_mask_{side}"]
    scores = policy.scores(params, policy.hidden(params, golden_rows(golden, side))[0])
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return np.abs(scores[np.arange(len(last)), last] - golden[f"rewards_{side}"]).max()


def router_errors(policy: Policy, router, golden, real) -> dict[str, float]:
    """The routers' logits, layer by layer, and the load-balancing loss."""
    names = sorted((n for n in golden.files if n.startswith(ROUTER)), key=lambda n: int(n.removeprefix(ROUTER)))
    if len(names) != (0 if router is None else len(router)):
        return {"router_layers": float("inf")}
    found = {
        name: np.abs(ours[real] - golden[name].reshape(*real.shape, -1)[real]).max()
        for name, ours in zip(names, () if router is None else router, strict=True)
    }
    if "aux_loss_right" in golden.files:
        aux = balance_loss(router, policy.config.experts.top_k, real.astype(np.float32))
        found["aux_loss"] = abs(float(aux) - float(golden["aux_loss_right"]))
    return found


def greedy_errors(policy: Policy, params, golden) -> tuple[int, float]:
    """(tokens of the continuations that differ, how far their log-probabilities are from those of training)."""
    ids, mask = golden["input_ids_left"], golden["attention_mask_left"]
    width = ids.shape[1]
    prompts = [row[real == 1].astype(np.int32) for row, real in zip(ids, mask, strict=True)]
    expected = golden["greedy_left"][:, width:]
    found = greedy(policy, params, prompts, expected.shape[1])
    wrong, gap = 0, 0.0
    for prompt, completion, row in zip(prompts, found, expected, strict=True):
        wrong += int((completion.tokens != row).sum())
        whole = linear_rows([np.concatenate([prompt, completion.tokens])], width + len(row))
        stats = row_logps(policy.hidden(params, whole)[0], policy.head(params), whole)
        again = stats.logps[0, len(prompt) : len(prompt) + len(row)]
        gap = max(gap, float(np.abs(completion.logps - again).max()))
    return wrong, gap


def main(directory: str) -> int:
    folders = sorted(path.parent for path in pathlib.Path(directory).glob("*/golden.npz"))
    verdicts = {folder.name: check(folder) for folder in folders}
    for name, verdict in verdicts.items():
        print(f"{name} {verdict}")
    passed = sum(verdict == "passed" for verdict in verdicts.values())
    print(f"{passed} passed, {len(verdicts) - passed} failed")
    return 0 if passed and passed == len(verdicts) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.parity.checkpoints DIR")
    sys.exit(main(sys.argv[1]))
