"""What merging takes: time, and the peak memory of a process that merges models larger than it ever holds.

    python bench/merge.py                       # 0.87 billion parameters in bfloat16, every method
    python bench/merge.py --layers 20 --methods ties

Models of random weights in the shape of Llama, the embedding of 128,256 words included. The peak is the process's own
(RSS, the mapped pages of input files included), beside that of one which merges next to nothing. What was seen:
docs/performance.md.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from etils import epath

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf.config import FAMILIES, config_files
from jaxpost.models.hf.names import pieces, sizes_of
from jaxpost.models.hf.save import json_bytes, place_folder
from jaxpost.ops.rope import Rope

DTYPE = np.dtype(ml_dtypes.bfloat16)
METHODS = {
    "linear": [],
    "slerp": [],
    "ties": ["--density=0.2"],
    "dare_linear": ["--density=0.2"],
    "dare_ties": ["--density=0.2"],
}


def shape(layers: int) -> ModelConfig:
    sizes = dict(vocab_size=128_256, embed_dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192)
    given = dict(family="llama", num_layers=layers, max_positions=8192, tied=True, norm_eps=1e-5)
    return ModelConfig(**sizes, **given, pattern=(Layer(Rope(500_000.0)),))


def write_model(folder: pathlib.Path, config: ModelConfig, seed: int) -> None:
    """Random weights, a tensor at a time."""
    rng, sizes = np.random.default_rng(seed), sizes_of(config)

    def tensors():
        for piece in pieces(FAMILIES[config.family].weights(config), config):
            yield piece.name, rng.standard_normal(piece.weight.shape(sizes), np.float32).astype(DTYPE)

    files = {name: json_bytes(values) for name, values in config_files(config, "bfloat16").items()}
    place_folder(epath.Path(folder), tensors(), files, shard_bytes=1024**3)


CHILD = """
import resource, sys
from jaxpost import cli
assert cli.main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
"""


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak RSS in bytes) of `jaxpost` with these arguments, as a process of its own (Linux)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True)
    kilobytes, processor = map(float, done.stdout.split()[-2:])
    return time.perf_counter() - started, processor, kilobytes * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", help="where to write the models (the system's temporary folder)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        at, config = pathlib.Path(folder), shape(flags.layers)
        for seed, name in enumerate(("base", "a", "b")):
            write_model(at / name, config, seed)
        size = sum(path.stat().st_size for path in (at / "a").glob("*.safetensors"))
        print(f"models of {size / 1e9:.2f} GB, {size / 2e9:.2f} billion parameters; load {os.getloadavg()[0]:.1f}")
        small = ["merge", "--method=linear", "--model=embedded:base", "--model=embedded:sft", f"--to={at / 'small'}"]
        print(f"models of 2 MB: peak {measure(small)[2] / 1e9:.2f} GB", flush=True)
        for name in flags.methods:
            base = [f"--base={at / 'base'}"] if METHODS[name] else []
            models = [f"--model={at / 'a'}", f"--model={at / 'b'}", f"--to={at / name}"]
            seconds, processor, most = measure(["merge", f"--method={name}", *METHODS[name], *base, *models])
            parts = f"{seconds:.0f} s ({processor:.0f} s of CPU), peak {most / 1e9:.2f} GB"
            print(f"{name}: {parts}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
