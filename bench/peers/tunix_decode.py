"""Completions by Tunix's own sampler with its Llama3, float32 on CPU. Run by bench/decode.py; prints one JSON line.

    python bench/peers/tunix_decode.py --workload FILE --rows R [--temperature T] [--repeats N]

R completions decode together until the last of them is done, then the next R, in the order of the workload. The
sampler's only means of a length is `max_generation_steps`, so each call is given that of its longest completion, and
what the others draw beyond their own is not counted, as tokens after an EOS would not be. All in its favour: prompts
are padded to the longest and no further, no log-probabilities are asked for, and each shape is compiled before.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import timing
from tunix.generate import sampler
from tunix_step import llama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    shape = work["model"]
    longest = max(map(len, work["prompts"]))
    cache = sampler.CacheConfig(
        cache_size=longest + max(map(max, work["lengths"])),
        num_layers=shape["num_hidden_layers"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
    )
    sample = sampler.Sampler(llama(work, seed=0), Ids(), cache)
    texts = [" ".join(map(str, prompt)) for prompt in work["prompts"] for _ in range(work["completions"])]
    lengths = [length for of_prompt in work["lengths"] for length in of_prompt]
    way = {"temperature": options.temperature, "top_p": 1.0} if options.temperature else {}

    def decode(seed: int) -> None:
        for start in range(0, len(texts), options.rows):
            rows, wanted = texts[start : start + options.rows], lengths[start : start + options.rows]
            found = sample(
                rows, max_generation_steps=max(wanted), max_prompt_length=longest, eos_tokens=[-1], seed=seed, **way
            )
            assert all(len(tokens) == max(wanted) for tokens in found.tokens)

    name = f"tunix {importlib.metadata.version('google-tunix')}"
    print(json.dumps({"peer": name, **timing.repeated(decode, options.repeats, sum(lengths))}))


class Ids:
    """A tokenizer whose words are the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def bos_id(self):
        return None  # the prompts have theirs

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


if __name__ == "__main__":
    main()
