"""Constrained choice: a completion that must be one of a few sequences of tokens."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxpost.errors import ConfigError
from jaxpost.types import Array, record

NONE = 2**31 - 1  # out of every vocabulary's bounds


@record
class Trie:
    """The beginnings of all choices; node 0 is the empty one. W children at most."""

    tokens: Array  # int32[N, W], what leads to a child; NONE where there is none
    children: Array  # int32[N, W]
    whole: Array  # bool[N], the node is a choice


def make_trie(choices: Sequence[Sequence[int]], vocab_size: int, stop_ids: Sequence[int]) -> Trie:
    """Raises ConfigError where one choice begins another and there is no stop token to tell them apart."""
    nodes: list[dict[int, int]] = [{}]
    whole = set()
    for choice in choices:
        node = 0
        for token in choice:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"sampling.choices: no token {token} in a vocabulary of {vocab_size}")
            if token not in nodes[node]:
                nodes[node][token] = len(nodes)
                nodes.append({})
            node = nodes[node][token]
        whole.add(node)
    if any(nodes[node] for node in whole) and not stop_ids:
        raise ConfigError("sampling.choices: one begins another, and there is no stop token that would end it")
    width = max(map(len, nodes))
    tokens = np.full((len(nodes), width), NONE, np.int32)
    children = np.zeros_like(tokens)
    for node, found in enumerate(nodes):
        tokens[node, : len(found)], children[node, : len(found)] = list(found), list(found.values())
    return Trie(tokens, children, np.array([node in whole for node in range(len(nodes))]))


def allowed(trie: Trie, node: Array, stops: Array, vocab_size: int) -> Array:
    """bool[C, V]: what may follow each node [C]."""
    row = jnp.arange(len(node))[:, None]
    found = jnp.zeros((len(node), vocab_size), bool).at[row, trie.tokens[node]].set(True, mode="drop")
    return found.at[row, stops[None]].max(trie.whole[node][:, None]) if len(stops) else found


def follow(trie: Trie, node: Array, token: Array) -> tuple[Array, Array]:
    """(the node after a token, or the same one after a stop; whether nothing can follow it)."""
    found = trie.tokens[node] == token[:, None]
    after = jnp.where(found.any(1), jnp.take_along_axis(trie.children[node], found.argmax(1)[:, None], 1)[:, 0], node)
    return after, (trie.tokens[after] == NONE).all(1)
