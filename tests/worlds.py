"""A tiny model folder and data files that tests of whole runs share: real formats, random weights."""

import gzip
import json
import pathlib

import jax

from jaxpost import embedded
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.models import hf
from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.policy import Policy
from jaxpost.ops.rope import Rope


def write_model(folder: pathlib.Path) -> pathlib.Path:
    """A random Llama of 60 K parameters with the embedded tokenizer, in Hugging Face layout."""
    tokenizer = load_tokenizer(embedded.path("base"))
    policy = Policy(
        ModelConfig(
            family="llama",
            vocab_size=tokenizer.vocab_size,
            embed_dim=32,
            mlp_dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            norm_eps=1e-6,
            tied=True,
            max_positions=128,
            pattern=(Layer(rope=Rope(10_000.0)),),
            bos_id=tokenizer.bos_id,
            eos_ids=(tokenizer.eos_id,),
        )
    )
    hf.export(folder, jax.jit(policy.init)(jax.random.key(0)), policy, tokenizer.files())
    return folder


def write_pairs(path: pathlib.Path, count: int = 60) -> pathlib.Path:
    """The first of the embedded world's held-out pairs."""
    with gzip.open(embedded.path("preferences_eval"), "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    keep = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs[:count]]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in keep))
    return path


def dpo_config(model, pairs, run_dir, **run) -> dict:
    """A DPO config of a few steps on tiny rows."""
    return {
        "stage": "dpo",
        "model": {"path": str(model)},
        "data": {"train": str(pairs), "eval_examples": 10},
        "batch": {"rows_per_step": 8, "tokens_per_row": 256, "documents_per_row": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "run": {"dir": str(run_dir), "steps": 6, "eval_prompts": 0, "log_to": (), "export": False, **run},
    }
