"""Weights in 8 or 4 bits, for a base that stays as it is while adapters train (QLoRA, arXiv:2305.14314).

A weight [in, ...] is cut along its first dimension into blocks of at most BLOCK entries, each scaled by its largest
absolute value: int8 steps of 1/127, or the 16 values of NF4, two to a byte. Both keep the dimensions of the weight, so
that it is sharded as the plain one is.
"""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.sharding.memory import back, on_device
from jaxpost.types import Array

BLOCK = 64
# QLoRA, appendix E: quantiles of a standard normal between -1 and 1, with an exact 0.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def block_of(size: int) -> int:
    """The largest even divisor of `size` that is at most BLOCK (an odd size is one block; NF4 needs an even one)."""
    return next((n for n in range(min(BLOCK, size), 1, -1) if size % n == 0 and n % 2 == 0), size)


def to_int8(weight: Array) -> tuple[Array, Array]:
    """(int8 like weight [in, ...], f32[in / block, ...])."""
    blocks, scale = _blocks(weight)
    return jnp.round(blocks / scale[:, None] * 127).astype(jnp.int8).reshape(weight.shape), scale / 127


def from_int8(values: Array, scale: Array, dtype: str) -> Array:
    blocks = values.reshape(len(scale), -1, *values.shape[1:]).astype(jnp.float32)
    return (blocks * scale[:, None]).astype(dtype).reshape(values.shape)


def to_nf4(weight: Array) -> tuple[Array, Array]:
    """(uint8[in / 2, ...] of two entries each, f32[in / block, ...])."""
    blocks, scale = _blocks(weight)
    edges = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    codes = jnp.searchsorted(edges, blocks / scale[:, None]).astype(jnp.uint8)
    pairs = codes.reshape(weight.shape[0] // 2, 2, *weight.shape[1:])
    return pairs[:, 0] << 4 | pairs[:, 1], scale


def from_nf4(values: Array, scale: Array, dtype: str) -> Array:
    codes = jnp.stack([values >> 4, values & 15], axis=1).reshape(2 * len(values), *values.shape[1:])
    blocks = jnp.asarray(NF4)[codes].reshape(len(scale), -1, *values.shape[1:])
    return (blocks * scale[:, None]).astype(dtype).reshape(codes.shape)


QUANTIZERS = {"int8": to_int8, "nf4": to_nf4}
QUANTIZED = {"weight_int8": from_int8, "weight_nf4": from_nf4}  # name of the leaf -> what reads it


def quantizer(kind: str, modules: Collection[str]):
    """(path, array) -> {path: array}: stacked weights [L, in, ...] of `modules` in 8 or 4 bits, others as they are."""
    quantize = jax.jit(jax.vmap(QUANTIZERS[kind]))

    def keep(path, array):
        if not _is_quantised(path, modules):
            return {path: array}
        made = back(quantize(on_device(array)), like=(array, array))
        return _leaves(path, kind, *jax.block_until_ready(made))  # one at a time: one plain weight is held

    return keep


def abstract(kind: str, modules: Collection[str], params: Any) -> Any:
    """What `quantizer` makes of ShapeDtypeStructs with shardings, which lie as the plain weights do."""
    found = {}
    for path, leaf in flatten_dict(params).items():
        if _is_quantised(path, modules):
            place = functools.partial(jax.ShapeDtypeStruct, sharding=leaf.sharding)
            parts = jax.eval_shape(jax.vmap(QUANTIZERS[kind]), leaf)
            found |= _leaves(path, kind, *(place(part.shape, part.dtype) for part in parts))
        else:
            found[path] = leaf
    return unflatten_dict(found)


def _is_quantised(path, modules) -> bool:
    return path[-1] == "weight" and path[0] in ("layers", "tail") and "/".join(path[1:-1]) in modules


def _leaves(path, kind: str, values, scale) -> dict:
    return {(*path[:-1], f"weight_{kind}"): values, (*path[:-1], f"weight_{kind}_scale"): scale}


def weight_of(leaves: dict[str, Array], dtype: str) -> Array:
    """The weight [in, ...] of a product out of its leaves, plain or quantised."""
    for name, read in QUANTIZED.items():
        if name in leaves:
            return read(leaves[name], leaves[f"{name}_scale"], dtype)
    return leaves["weight"].astype(dtype)


def _blocks(weight):
    blocks = weight.astype(jnp.float32).reshape(-1, block_of(weight.shape[0]), *weight.shape[1:])
    scale = jnp.abs(blocks).max(axis=1)
    return blocks, jnp.where(scale == 0, 1.0, scale)
