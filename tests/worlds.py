"""A tiny model folder and data files that tests of whole runs share: real formats, random weights."""

import contextlib
import gzip
import json
import pathlib

import pytest

from jaxpost import embedded
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.models import hf
from jaxpost.models.policy import Policy
from jaxpost.train.loop import Loop
from tests.models.tiny import random_params, tiny_config


def write_model(folder: pathlib.Path, seed: int = 0, **changes) -> pathlib.Path:
    """A random Llama of 60 K parameters with the embedded tokenizer; `changes`: of its config."""
    tokenizer = load_tokenizer(embedded.path("base"))
    values = {"vocab_size": tokenizer.vocab_size, "eos_ids": (tokenizer.eos_id,), "max_positions": 128, "tied": True}
    values |= {"embed_dim": 32, "mlp_dim": 64, "num_layers": 2}
    policy = Policy(tiny_config(**values | changes))
    hf.export(folder, random_params(policy, seed), policy, tokenizer.files())
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


@contextlib.contextmanager
def crash_after(step: int):
    """The run inside breaks off before it writes the row of any later step; the error ends with the block."""
    write = Loop.write

    def crash(self, now, *rest):
        if now > step:
            raise KeyboardInterrupt
        write(self, now, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "write", crash)
        yield
