"""Our side of "an export gives the same logits in transformers": `python -m tests.parity.exports FOLDER LOGITS.npz`.

Reads the model in FOLDER (Hugging Face layout), makes two rows of random ids from a fixed seed, as long as the model's
context allows and at most 128, and writes ids int32[2, T] and logits float32[2, T, V] to LOGITS.npz; of a reward model
logits are its scores at the last tokens, float32[2, R]. Then, in an environment with torch and transformers, which
this project never imports:

    python bench/check_export.py FOLDER LOGITS.npz
"""

import sys

import jax
import numpy as np

from jaxpost.models.hf import load_params, read_config
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import logits
from jaxpost.types import Rows


def logits_of(folder: str) -> dict[str, np.ndarray]:
    policy = Policy(read_config(folder))
    params = load_params(folder, policy)
    width = min(128, policy.config.max_positions)
    known = [i for i in range(policy.config.vocab_size) if i != policy.config.pad_id]  # it reads scores before padding
    ids = np.random.default_rng(0).choice(known, (2, width)).astype(np.int32)
    one, positions = np.ones_like(ids), np.tile(np.arange(width, dtype=np.int32), (2, 1))
    hidden, _ = jax.jit(policy.hidden)(params, Rows(ids, one, one * 0, positions, one.astype(np.float32)))
    if policy.config.num_scores:
        return {"ids": ids, "logits": np.asarray(policy.scores(params, hidden[:, -1:])[:, 0])}
    found = logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params))
    return {"ids": ids, "logits": np.asarray(found).reshape(*ids.shape, -1)}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.parity.exports FOLDER LOGITS.npz")
    np.savez(sys.argv[2], **logits_of(sys.argv[1]))
