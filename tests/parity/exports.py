"""Our side of "an export gives the same logits in transformers": `python -m tests.parity.exports FOLDER LOGITS.npz`.

Reads the model in FOLDER (Hugging Face layout), makes two rows of random ids from a fixed seed, as long as the model's
context allows and at most 128, and writes ids int32[2, T] and logits float32[2, T, V] to LOGITS.npz. Then, in an
environment with torch and transformers, which this project never imports:

    python bench/check_export.py FOLDER LOGITS.npz
"""

import sys

import jax
import numpy as np

from jaxpost.models.hf import load_params, read_config
from jaxpost.models.policy import Policy
from jaxpost.types import Rows
from tests.parity.checkpoints import head_logits


def logits_of(folder: str) -> dict[str, np.ndarray]:
    policy = Policy(read_config(folder))
    params = load_params(folder, policy)
    width = min(128, policy.config.max_positions)
    ids = np.random.default_rng(0).integers(0, policy.config.vocab_size, (2, width)).astype(np.int32)
    one, positions = np.ones_like(ids), np.tile(np.arange(width, dtype=np.int32), (2, 1))
    hidden = jax.jit(policy.hidden)(params, Rows(ids, one, one * 0, positions, one.astype(np.float32)))
    return {"ids": ids, "logits": np.asarray(head_logits(hidden, policy.head(params)))}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.parity.exports FOLDER LOGITS.npz")
    np.savez(sys.argv[2], **logits_of(sys.argv[1]))
