"""A small model with everything in it: two kinds of layers, a tail, grouped heads; and rows to feed it."""

import jax
import numpy as np

from jaxpost.models.config import Experts, Layer, ModelConfig
from jaxpost.models.policy import Policy
from jaxpost.ops.rope import Rope
from jaxpost.sampling.engine import Sampling, sample
from jaxpost.sampling.local import LocalEngine
from jaxpost.types import Rows

LLAMA3 = Rope(10_000.0, "llama3", 4.0, 1.0, 4.0, 16)


def tiny_config(**changes) -> ModelConfig:
    values = dict(
        family="llama",
        vocab_size=48,
        embed_dim=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=24,
        max_positions=64,
        tied=False,
        norm_eps=1e-5,
        pattern=(Layer(LLAMA3),),
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )
    return ModelConfig(**values | changes)


def patterned_config() -> ModelConfig:
    """5 layers over a period of 2: two whole periods and a tail of one; windows and RoPE bases alternate."""
    return tiny_config(num_layers=5, pattern=(Layer(Rope(100.0), window=3), Layer(Rope(10_000.0))))


def experts_config(**changes) -> ModelConfig:
    """A dense layer between two mixtures of 8 experts, 2 a token."""
    layers = tuple(Layer(Rope(100.0), experts=experts) for experts in (True, False, True))
    return tiny_config(pattern=layers, experts=Experts(8, 2, 12, True, 0.01), **changes)


def linear_rows(documents: list[np.ndarray], width: int) -> Rows:
    """The documents in one row, one segment each, every token but the first of each with weight 1."""
    fields = {name: np.zeros((1, width), np.int32) for name in ("tokens", "segments", "branches", "positions")}
    weights, start = np.zeros((1, width), np.float32), 0
    for n, document in enumerate(documents):
        span = slice(start, start + len(document))
        fields["tokens"][0, span] = document
        fields["segments"][0, span] = n + 1
        fields["positions"][0, span] = np.arange(len(document))
        weights[0, span] = np.arange(len(document)) > 0
        start += len(document)
    return Rows(**fields, weights=weights)


def random_documents(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 48, n).astype(np.int32) for n in lengths]


def stack_rows(*rows: Rows) -> Rows:
    return Rows(*(np.concatenate([getattr(r, name) for r in rows]) for name in Rows.__dataclass_fields__))


def random_params(policy: Policy, seed: int = 0):
    """Parameters made by numpy (compiling an init takes seconds); norms are off 1, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return jax.numpy.asarray(offset + 0.25 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, policy.abstract())


def greedy(policy: Policy, params, prompts, max_new_tokens: int, stop_ids=()):
    """One greedy Completion a prompt."""
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=0, stop_ids=tuple(stop_ids))
    engine = LocalEngine(policy, slots=max(1, len(prompts)))
    return [found for (found,) in sample(engine, params, prompts, jax.random.key(0), settings=settings)]
