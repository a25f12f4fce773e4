"""jaxpost's SFT and DPO steps on one workload, float32 on CPU. Run by bench/step.py; prints one JSON line.

    python bench/peers/jaxpost_step.py --workload FILE [--reference live|cached] [--rows R --tokens T]

What `python -m jaxpost.main` runs between two log lines: documents packed by the Loader, built in its threads, the
jit-compiled step with the state donated, its metrics fetched. R rows of T tokens stand for the peers' padded batch.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jaxpost
from jaxpost.data.loader import Loader
from jaxpost.data.values import attach
from jaxpost.keys import BatchConfig, OptimizerConfig
from jaxpost.losses import preference
from jaxpost.losses import sft as sft_losses
from jaxpost.models.hf import read_config
from jaxpost.models.policy import Policy
from jaxpost.sharding import make_mesh
from jaxpost.train import objectives, reference
from jaxpost.train.optimizer import make_optimizer
from jaxpost.train.step import make_train_step
from jaxpost.types import Document, Origin, TrainState

BETA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    parser.add_argument("--reference", choices=["live", "cached"], default="cached")
    parser.add_argument("--rows", type=int, required=True, help="rows_per_step")
    parser.add_argument("--tokens", type=int, required=True, help="tokens_per_row")
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        print(json.dumps(measure(work, options, objectives.logits_chunk(mesh))))


def measure(work: dict, options, chunk: int) -> dict:
    policy = Policy(model_config(work["model"]))
    params = jax.jit(policy.init)(jax.random.key(0))
    documents = [document(example, i) for i, example in enumerate(work["examples"])]
    batch = BatchConfig(options.rows, options.tokens)
    frozen, rate = None, None
    if work["kind"] == "sft":
        objective = objectives.sft_objective(policy, sft_losses.nll, chunk=chunk)
    else:
        live = options.reference == "live"

        def live_logps(frozen, carry, batch):
            return objectives.token_logps_of(policy, frozen["reference"], batch, chunk=chunk)

        objective = objectives.preference_objective(
            policy,
            {"dpo": (1.0, functools.partial(preference.sigmoid, beta=BETA))},
            chunk=chunk,
            reference_logps=live_logps if live else objectives.cached_reference,
        )
        if live:
            frozen = {"reference": jax.tree.map(jnp.copy, params)}
        else:
            documents, rate = with_reference(documents, policy, params, batch, chunk)
    loader = make_loader(documents, batch, branches=0 if work["kind"] == "sft" else 2)
    settings = OptimizerConfig(schedule="constant", **work["optimizer"])
    optimizer = make_optimizer(settings, loader.total_steps(1), params).transform
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), jax.random.key(0), None)
    step = jax.jit(make_train_step(objective, optimizer), donate_argnums=0)

    first_loss, seconds, examples = None, [], 0
    for _ in range(work["warmup"]):
        state, metrics = step(state, frozen, jax.device_put(loader.batch(0)))
        first_loss = first_loss or float(metrics["loss"].value)
    with loader.iterate() as batches:
        start, waited = time.perf_counter(), 0.0
        for numpy_batch in batches:
            waited += time.perf_counter() - start
            state, metrics = step(state, frozen, jax.device_put(numpy_batch))
            jax.device_get(metrics)
            end = time.perf_counter()
            seconds.append(end - start)
            examples += int((numpy_batch.example_ids >= 0).sum())
            start = end
    return {
        "peer": f"jaxpost {jaxpost.__version__}",
        "seconds_per_step": statistics.median(seconds),
        "examples_per_second": examples / sum(seconds),
        "reference_examples_per_second": rate,
        "first_loss": first_loss,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "data_wait_share": waited / sum(seconds),
        "step_seconds": seconds,
    }


def model_config(shape: dict):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
        return read_config(folder)


def document(example, index: int) -> Document:
    if isinstance(example, list):  # one sequence, all of it trained
        example = {"prompt": [], "text": example}
    prompt, *completions = example.values()
    completions = tuple(np.asarray(ids, np.int32) for ids in completions)
    weights = tuple(np.ones(len(ids), np.float32) for ids in completions)
    return Document(np.asarray(prompt, np.int32), completions, weights, index, Origin("workload", index + 1))


def make_loader(documents, batch: BatchConfig, branches: int, shuffle: bool = True) -> Loader:
    return Loader(
        documents,
        rows_per_step=batch.rows_per_step,
        tokens_per_row=batch.tokens_per_row,
        documents_per_row=batch.documents_per_row,
        branches=branches,
        seed=0,
        shuffle=shuffle,
        epochs=1,
    )


def with_reference(documents, policy: Policy, params, batch: BatchConfig, chunk: int):
    """Documents with cached reference log-probabilities, and how many of them a second the pass handles."""
    config = types.SimpleNamespace(batch=batch)
    store = reference.compute_logps(documents, config, policy, params, make_mesh(), chunk)
    logps = jax.jit(lambda params, batch: objectives.token_logps_of(policy, params, batch, chunk=chunk))
    loader = make_loader(documents, batch, branches=2, shuffle=False)
    jax.block_until_ready(logps(params, loader.batch(0)))
    start = time.perf_counter()
    for step in range(loader.steps_in_epoch(0)):
        jax.device_get(logps(params, loader.batch(step)))
    rate = len(documents) / (time.perf_counter() - start)
    return attach(documents, reference.NAME, store), rate


if __name__ == "__main__":
    main()
