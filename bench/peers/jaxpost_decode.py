"""Completions by jaxpost's LocalEngine, float32 on CPU. Run by bench/decode.py; prints one JSON line.

    python bench/peers/jaxpost_decode.py --workload FILE --rows R [--temperature T] [--repeats N]

R slots; each completion is limited to its length. Weights are handed over in every call, as they are after an update.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import timing
from jaxpost_step import model_config

import jaxpost
from jaxpost.models.policy import Policy
from jaxpost.sampling.engine import Sampling, sample
from jaxpost.sampling.local import LocalEngine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    policy = Policy(model_config(work["model"]))
    params = jax.jit(policy.init)(jax.random.key(0))
    engine = LocalEngine(policy, slots=options.rows)
    prompts = [np.array(prompt, np.int32) for prompt in work["prompts"]]
    asked = {"completions": work["completions"], "limits": work["lengths"]}
    asked["settings"] = Sampling(max(map(max, work["lengths"])), temperature=options.temperature)

    def decode(seed: int) -> None:
        found = sample(engine, params, prompts, jax.random.key(seed), **asked)
        assert [[len(c.tokens) for c in of_prompt] for of_prompt in found] == work["lengths"]

    tokens = sum(map(sum, work["lengths"]))
    print(json.dumps({"peer": f"jaxpost {jaxpost.__version__}", **timing.repeated(decode, options.repeats, tokens)}))


if __name__ == "__main__":
    main()
