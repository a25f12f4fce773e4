"""Name maps: which tensor of a file is which part of which parameter."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxpost.models.config import ModelConfig, stack_row


@dataclasses.dataclass(frozen=True)
class Weight:
    """One kind of tensor in a file, and where it lies in the parameters.

    name: of the tensor; "{layer}" stands for the layer number, "{expert}" for the expert's.
    path: of the parameter, "layers/attn/q/weight". Under "layers" its first dimension, the layer, is not in `dims`, and
      neither is the expert's where the name has one.
    dims: "(H h) D -> D H h": dimensions of the tensor (merged ones in brackets) -> of the parameter.
    """

    name: str
    path: str
    dims: str

    def groups(self) -> list[list[str]]:
        """Letters of each dimension of the tensor."""
        left = self.dims.split("->")[0]
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]

    def letters(self) -> list[str]:
        """Letter of each dimension of the parameter."""
        return self.dims.split("->")[1].split()

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups())


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a file and its place: the parameter `path` at an index: (), (row of a layer) or (row, expert)."""

    weight: Weight
    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The dimension letters of `types`, for this model."""
    experts = {"E": config.experts.count, "f": config.experts.mlp_dim} if config.experts else {}
    return experts | {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "F": config.mlp_dim,
        "R": config.num_scores,
    }


def pieces(weights: tuple[Weight, ...], config: ModelConfig) -> Iterator[Piece]:
    """Every tensor that the files of this model must hold."""
    layers = config.layers
    scanned = config.num_layers - config.tail_layers
    for weight in weights:
        path = tuple(weight.path.split("/"))
        if "{layer}" not in weight.name:
            yield Piece(weight, weight.name, path, ())
            continue
        for layer in range(config.num_layers):
            stack, first = ("layers", 0) if layer < scanned else ("tail", scanned)
            row = stack_row(layers[first:], layer - first, path[1])
            if row is None:
                continue
            for expert in range(config.experts.count) if "{expert}" in weight.name else (None,):
                name = weight.name.format(layer=layer, expert=expert)
                yield Piece(weight, name, (stack, *path[1:]), (row,) if expert is None else (row, expert))


def to_tensor(weight: Weight, value: np.ndarray) -> np.ndarray:
    """The tensor of the file out of its piece of a parameter, contiguous."""
    letters = weight.letters()
    order = [letters.index(letter) for group in weight.groups() for letter in group]
    shape = weight.shape(dict(zip(letters, value.shape, strict=True)))
    # safetensors writes a transposed view as if it were contiguous: silently wrong values.
    return np.ascontiguousarray(value.transpose(order).reshape(shape))


def from_slice(weight: Weight, tensor: Any, index: tuple[slice, ...], sizes: dict[str, int]) -> np.ndarray:
    """The part `index` (start and stop per letter) of a piece of a parameter, read from a lazy slice of a file."""
    letters = weight.letters()
    wanted = dict(zip(letters, index, strict=True))
    read, shape, inner = [], [], []
    for first, *rest in weight.groups():
        outer = wanted[first]
        width = math.prod(sizes[letter] for letter in rest)  # entries of the file's dimension per step of `first`
        read.append(slice(outer.start * width, outer.stop * width))
        shape += [outer.stop - outer.start, *(sizes[letter] for letter in rest)]
        inner += [slice(None), *(wanted[letter] for letter in rest)]
    value = np.asarray(tensor[tuple(read)]).reshape(shape)[tuple(inner)]
    order = [letter for group in weight.groups() for letter in group]
    return value.transpose([order.index(letter) for letter in letters])
