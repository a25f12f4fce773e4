"""Reward models on rankings of K=4: one row that holds the prompt once, against pairs trained apart.

    python bench/rankings.py [--prompt 128] [--completion 64] [--rankings 4] [--steps 7]

Every way trains on the same rankings a step: forward, backward, AdamW, float32 on CPU, model of bench/workload.py with
one scalar head. A document has a row to itself and fills it, so that padding plays no part. The six pairs have the loss
of the ranking (all_pairs), printed as evidence of equal work. A time is CPU time (all threads) over the cores, which a
busy machine distorts least: the median over the steps after the first two.
"""

import argparse
import itertools
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import workload
from peers.jaxpost_step import model_config

from jaxpost.data.rows import build_batch
from jaxpost.keys import OptimizerConfig
from jaxpost.losses import reward
from jaxpost.models.policy import Policy
from jaxpost.train.optimizer import make_optimizer
from jaxpost.train.reward import reward_objective
from jaxpost.train.step import make_train_step
from jaxpost.types import Document, Origin, TrainState

K, WARMUP = 4, 2
ALL = tuple(itertools.combinations(range(K), 2))
NEXT = tuple(itertools.pairwise(range(K)))  # each with the next worse one
WAYS = {  # name -> (completions of each document, whether they share the prompt)
    "one ranking, prompt once": ((tuple(range(K)),), True),
    "6 pairs, prompt once in each": (ALL, True),
    "6 pairs, every completion with its prompt": (ALL, False),
    "4 pairs, prompt once in each": ((*NEXT, (0, K - 1)), True),
    "4 pairs, every completion with its prompt": ((*NEXT, (0, K - 1)), False),
    "3 pairs, prompt once in each": (NEXT, True),
    "3 pairs, every completion with its prompt": (NEXT, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--rankings", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=7, help="timed steps")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(3, workload.MODEL["vocab_size"], count).astype(np.int32)  # noqa: E731
    given = [(draw(options.prompt), [draw(options.completion) for _ in range(K)]) for _ in range(options.rankings)]
    print("| way | tokens a ranking | ratio | s/step | ratio | first loss |\n|---|---|---|---|---|---|")
    base = None
    for name, (groups, shared) in WAYS.items():
        rows = [[document(prompt, completions, group, shared)] for prompt, completions in given for group in groups]
        tokens, (seconds, loss) = len(groups) * rows[0][0].cost, measure(rows, options.steps)
        base = base or (tokens, seconds)
        ratios = tokens / base[0], seconds / base[1]
        print(f"| {name} | {tokens:,} | {ratios[0]:.2f} | {seconds:.3f} | {ratios[1]:.2f} | {loss:.6f} |", flush=True)


def document(prompt, completions, group, shared: bool) -> Document:
    """The completions of `group` behind their prompt; not shared: behind its first token, the rest copied into each."""
    kept = len(prompt) if shared else 1
    parts = tuple(np.concatenate([prompt[kept:], completions[n]]) for n in group)
    weights = tuple(np.ones(len(part), np.float32) for part in parts)
    scores = {"score": tuple(float(K - n) for n in group)}
    return Document(prompt[:kept], parts, weights, 0, Origin("ranking", 1), completion=scores)


def measure(rows, steps: int) -> tuple[float, float]:
    """(seconds a step, loss before the first)."""
    most = len(rows[0][0].completions)
    shape = {"rows_per_step": len(rows), "tokens_per_row": rows[0][0].cost, "documents_per_row": 1}
    batch = jax.device_put(build_batch(rows, **shape, branches=most))
    policy = Policy(
        model_config(workload.MODEL | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1})
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    loss = reward.all_pairs if most > 2 else reward.bradley_terry
    optimizer = make_optimizer(OptimizerConfig(**workload.OPTIMIZER), WARMUP + steps, params).transform
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), jax.random.key(0), None)
    step = jax.jit(make_train_step(reward_objective(policy, loss, branches=most), optimizer), donate_argnums=0)
    first, seconds = None, []
    for _ in range(WARMUP + steps):
        start = time.process_time()
        state, metrics = step(state, None, batch)
        value = float(metrics["loss"].value)
        first = value if first is None else first
        seconds.append((time.process_time() - start) / os.cpu_count())
    return statistics.median(seconds[WARMUP:]), first


if __name__ == "__main__":
    main()
