"""Bytes a device holds while a program runs, by what they are for; and the FLOPs that its model needs.

Arguments are exact: shapes over shardings. What a training step computes on the way is counted from the shapes of the
model: gradients, what the backward pass keeps, and the working memory of its widest moment. This needs no compiler, so
it serves GPUs and the search for meshes; where there is a compiler, the plan shows both.
"""

import dataclasses
import math

import jax
import numpy as np

from jaxpost.models.config import ModelConfig
from jaxpost.models.policy import Policy
from jaxpost.ops.vocab import PART
from jaxpost.sharding import batch_shards
from jaxpost.sharding.memory import KIND
from jaxpost.train.planned import Program

GRADIENTS, KEPT, WORKING = "gradients", "kept for the backward pass", "working memory"


def held(tree, host: bool = False) -> int:
    """Bytes of a tree of ShapeDtypeStructs on each device, or (host) of its share in the host's memory."""

    def size(leaf):
        shape, place = leaf.shape, getattr(leaf, "sharding", None)
        if place is not None:
            if (place.memory_kind == KIND) != host:
                return 0
            shape = place.shard_shape(shape)
        elif host:
            return 0
        item = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        return math.prod(shape) * item

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def ledger(program: Program, mesh) -> dict[str, int]:
    """{what: bytes a device} while the program runs, in the order of its arguments, then what it makes on the way."""
    found = {name: held(tree) for name, tree in program.ledger.items()}
    if program.trained is not None:
        found[GRADIENTS] = gradients(program)
        found[KEPT] = program.trunks * kept(program.policy, program.rows, mesh)
    found[WORKING] = working(program, mesh)
    return {name: size for name, size in found.items() if size}


def gradients(program: Program) -> int:
    """Bytes of gradients: in the parameters' type; of several microbatches besides in f32, where they add up."""
    size = held(program.trained)
    if program.microbatches == 1:
        return size
    exact = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), program.trained)
    return size + held(exact)


def local_tokens(rows: tuple[int, int], mesh) -> int:
    """Tokens of [B, T] on each device."""
    return math.ceil(rows[0] / batch_shards(mesh)) * math.ceil(rows[1] / mesh.shape["context"])


def kept(policy: Policy, rows: tuple[int, int], mesh) -> int:
    """Bytes that the forward pass keeps for the backward pass, of the layers."""
    c, tensor, item = policy.config, mesh.shape["tensor"], np.dtype(policy.compute_dtype).itemsize
    tokens = local_tokens(rows, mesh)
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim // tensor
    products = heads + 2 * _mlp_width(c) // tensor + 2 * c.embed_dim  # q k v, gate, up, o, down
    more = {
        "full": 0,
        "offload": -c.embed_dim,
        "dots": products + c.num_heads * c.head_dim // tensor,
        "dots_no_batch": products,
        "none": 2 * products + 6 * c.embed_dim,  # norms in f32, rotated q and k, activations
    }[policy.remat]
    return c.num_layers * tokens * (c.embed_dim + more) * item


def working(program: Program, mesh) -> int:
    """Bytes of temporaries at the widest moment of a program: of a layer, of the head or of the embedding."""
    c, sizes = program.policy.config, dict(mesh.shape)
    if not program.rows[1]:  # caches of some prompts, whole, on their way into slots; keys or values of them twice
        cache = program.ledger["KV cache"][-1]
        return 3 * program.rows[0] * held(cache) * batch_shards(mesh) // (2 * cache.lengths.shape[0])
    item, tokens = np.dtype(program.policy.compute_dtype).itemsize, local_tokens(program.rows, mesh)
    return max(_layer(program, sizes, tokens, item), _head(program, sizes, tokens, item), c.embed_dim * item * tokens)


def _layer(program: Program, sizes, tokens: int, item: int) -> int:
    """The widest weights of a layer, gathered; what they are multiplied with, and in training gradients of both.

    The multiples of the widths are those that fit what the TPU compiler made of the plans in configs/plans.
    """
    c, tensor = program.policy.config, sizes["tensor"]
    # Of the widest weights one is in use and one on its way; where a token decodes, of all of a layer's.
    widest = _layer_weights(c, sizes) if program.rows[1] == 1 else c.embed_dim * c.mlp_dim // tensor
    gathered = 0 if sizes["fsdp"] * sizes["context"] == 1 else widest * item
    heads, mlp = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim // tensor, _mlp_width(c) // tensor
    mixed = 0
    if c.experts:  # a row for every expert that any token of the expert axis may go to (ops/experts.py)
        rows = tokens * sizes["expert"] * min(c.experts.top_k, c.experts.count // sizes["expert"])
        mixed = rows * item * (2 * c.embed_dim + 4 * c.experts.mlp_dim // tensor)
    if program.trained is None:
        return 2 * gathered + tokens * item * (heads + 2 * mlp + 3 * c.embed_dim) + mixed // 2
    return 2 * gathered + tokens * item * (3 * heads + 5 * mlp + 8 * c.embed_dim) + mixed


def _head(program: Program, sizes, tokens: int, item: int) -> int:
    """A part of the vocabulary's table and its f32 gradient, the hidden states and their f32 gradient."""
    c = program.policy.config
    if c.num_scores or program.rows[1] == 1:
        return 0
    part = min(PART, c.vocab_size // sizes["tensor"] * c.embed_dim)
    states = tokens * c.embed_dim
    return part * item + states * 2 * item + (part * 4 + states * 4 if program.trained is not None else 0)


def _mlp_width(c: ModelConfig) -> int:
    """Widest MLP of a token: of the experts that it goes through together."""
    return max(c.mlp_dim, c.experts.top_k * c.experts.mlp_dim if c.experts else 0)


def _layer_weights(c: ModelConfig, sizes) -> int:
    """Parameters of one layer on a device, whole along fsdp."""
    attention = c.embed_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    mlp = 3 * c.embed_dim * c.mlp_dim
    if c.experts:
        mlp = 3 * c.embed_dim * c.experts.mlp_dim * c.experts.count // sizes["expert"]
    return (attention + mlp) // sizes["tensor"]


def forward_flops(c: ModelConfig, rows: tuple[int, int]) -> float:
    """FLOPs of one forward pass over [B, T] that are full, over all devices: products, a multiply-add being two.

    Attention is counted as of one document a row: a query sees half of the row, or its window.
    """
    B, T = rows
    if not T:
        return 0.0
    attention = c.embed_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    dense, mixed = 3 * c.embed_dim * c.mlp_dim, 0
    if c.experts:
        mixed = c.embed_dim * (3 * c.experts.top_k * c.experts.mlp_dim + c.experts.count)
    seen = [min(layer.window or T, T) for layer in c.layers]
    scores = sum(4 * c.num_heads * c.head_dim * (n - n * n / (2 * T)) for n in seen)
    layers = sum(2 * (attention + (mixed if layer.experts else dense)) for layer in c.layers)
    head = 2 * c.embed_dim * (c.num_scores or c.vocab_size)
    return B * T * (layers + scores + head)


def model_flops(program: Program) -> float:
    """FLOPs that a call needs, over all devices, without what is computed twice."""
    return program.passes * forward_flops(program.policy.config, program.rows)


def computed_flops(program: Program) -> float:
    """The same with what the backward pass computes again: of `full`, one more forward pass."""
    again = 1 if program.trained is not None and program.policy.remat in ("full", "offload") else 0
    return model_flops(program) * (1 + again / 3)


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that a device receives in a call, estimated: weights gathered and gradients reduced along fsdp and data."""

    gathered: float
    reduced: float


def moved(program: Program, mesh) -> Moved:
    """Of a layout without tensor or expert parallelism; those two add activations, which only the compiler tells."""
    sizes, c = dict(mesh.shape), program.policy.config
    n, item = sizes["fsdp"] * sizes["context"], np.dtype(program.policy.compute_dtype).itemsize
    layers = c.num_layers * _layer_weights(c, sizes) + c.embed_dim * c.vocab_size // sizes["tensor"]
    weights = layers * item * (n - 1) / n
    trained = program.trained is not None
    passes = max(1, round(program.passes / 3)) * 2 if trained else program.passes
    copies = sizes["slices"] * sizes["data"]
    gradients = held(program.trained) * n if trained else 0
    return Moved(weights * passes, gradients * (n - 1) / n + 2 * gradients / n * (copies - 1) / copies)
