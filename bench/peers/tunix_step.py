"""Tunix's PeftTrainer (all weights) and DPOTrainer with its Llama3, float32 on CPU. Run by bench/step.py.

Prints one JSON line.

    python bench/peers/tunix_step.py --workload FILE

Prompts are padded left to `max_prompt` and completions right to `max_completion`, the fixed shapes that DPOTrainer
itself makes of text: any other shape would compile again. It computes the reference in every step; it has no cache.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import hooks, peft_trainer, utils
from tunix.sft.dpo import dpo_trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    work = json.loads(parser.parse_args().workload.read_text())
    clock = Clock()
    trainer, batches = (sft if work["kind"] == "sft" else dpo)(work)
    trainer.with_training_hooks(clock)
    trainer.train(batches)
    seconds = clock.step_seconds()[work["warmup"] - 1 :]
    assert len(seconds) == work["steps"], (len(seconds), work["steps"])
    report = {
        "peer": f"tunix {importlib.metadata.version('google-tunix')}",
        "seconds_per_step": statistics.median(seconds),
        "examples_per_second": work["batch"] * len(seconds) / sum(seconds),
        "reference_examples_per_second": None,
        "first_loss": clock.losses[0],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "step_seconds": seconds,
    }
    print(json.dumps(report))


class Clock(hooks.TrainingHooks):
    """When each step ended: its hook is called once the next step has been started and its own loss is there."""

    def __init__(self):
        self.ends, self.losses = [], []

    def step_seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.ends.append(time.perf_counter())
        self.losses.append(float(train_loss))

    def on_train_start(self, train_ctx): ...
    def on_train_end(self, train_ctx): ...
    def on_train_step_start(self, train_ctx): ...
    def on_eval_step_start(self, train_ctx): ...
    def on_eval_step_end(self, train_ctx, eval_loss): ...


def sft(work: dict):
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=work["warmup"] + work["steps"])
    trainer = peft_trainer.PeftTrainer(llama(work, seed=0), optimizer(work), config)
    trainer.with_gen_model_input_fn(model_input)
    rows = np.asarray(work["examples"], np.int32).reshape(-1, work["batch"], work["length"])
    return trainer, [peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones_like(ids, bool)) for ids in rows]


def model_input(batch: peft_trainer.TrainingInput) -> dict:
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def dpo(work: dict):
    """Policy and reference are built from one seed, so that the first loss is ln 2."""
    steps = work["warmup"] + work["steps"]
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=steps, beta=0.1)
    trainer = dpo_trainer.DPOTrainer(llama(work, seed=0), llama(work, seed=0), optimizer(work), config)
    size = work["batch"]
    return trainer, [padded(work["examples"][step * size :][:size], work) for step in range(steps)]


def padded(pairs: list[dict], work: dict) -> dpo_trainer.TrainingInput:
    arrays = {}
    for key, limit in [("prompt", "max_prompt"), ("chosen", "max_completion"), ("rejected", "max_completion")]:
        ids = np.zeros((len(pairs), work[limit]), np.int32)
        mask = np.zeros_like(ids)
        for row, pair in enumerate(pairs):
            where = slice(-len(pair[key]), None) if key == "prompt" else slice(len(pair[key]))
            ids[row, where], mask[row, where] = pair[key], 1
        arrays |= {f"{key}_ids": ids, f"{key}_mask": mask}
    return dpo_trainer.TrainingInput(**arrays)


def optimizer(work: dict) -> optax.GradientTransformation:
    options = dict(work["optimizer"])
    return optax.chain(optax.clip_by_global_norm(options.pop("clip_norm")), optax.adamw(**options))


def llama(work: dict, seed: int) -> llama3.Llama3:
    shape = work["model"]
    config = llama3.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        weight_tying=shape["tie_word_embeddings"],
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


if __name__ == "__main__":
    main()
