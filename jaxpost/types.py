"""The few records that pass between rooms. Arrays are numpy on the host and jax on the device.

Dimension letters, used in every signature and einsum of the project:
B rows, T row tokens (queries), S keys, M documents of a row, N branches, P pairs, C completions,
D model, H heads, K kv heads, h head size, F mlp, V vocabulary, E experts, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # numpy or jax array; signatures say the shape in their docstrings


def record(cls):
    """A frozen dataclass that is a pytree of all its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@record
class Rows:
    """Packed rows, every prompt present once. All fields [B, T].

    Branch 0 holds a document's prompt without its last token; every branch n >= 1 begins with a copy of that
    token (weight 0). So the token before t in the row is the one that predicts t, within its own
    (segment, branch), and the first token of each has weight 0. A linear document (SFT) is all branch 0.
    Query i sees key j iff j <= i, segments[i] == segments[j] and branches[j] in (0, branches[i]).
    """

    tokens: Array  # int32, 0 where empty
    segments: Array  # int32, 1..M: which document of the row; 0 = empty
    branches: Array  # int32, 0 = shared prompt, 1..N = completion n
    positions: Array  # int32, position in its own branch: every branch continues from the prompt
    weights: Array  # f32, loss weight of this token as a target


@record
class Batch:
    """What a step sees.

    token: per-token values [B, T] (reference_logps, advantages, ...), aligned with rows.tokens as targets.
    completion: per-completion values [B, M, N]; "mask" (f32, 1 where there is a completion) is always there
      when documents have branches. Index m is segment m + 1, index n is branch n + 1.
    example_ids: int32[B, M], -1 where empty: index of the example in its data source.
    """

    rows: Rows
    token: dict[str, Array]
    completion: dict[str, Array]
    example_ids: Array


@record
class Mean:
    """A mean as sum and weight: it adds over microbatches, devices and hosts and is divided once."""

    total: Array
    weight: Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self):
        """total / weight; where the weight is 0, so is the total, and the mean. numpy and jax arrays, plain floats."""
        where = jnp.where if isinstance(self.weight, jax.Array) else np.where
        return self.total / where(self.weight == 0, 1.0, self.weight)


@record
class Term:
    """One term of a loss: coefficient * mean.total / mean.weight."""

    coefficient: Array
    mean: Mean


@record
class TrainState:
    """Everything a step changes. `params` is what the optimizer owns; `carry` what a method remembers."""

    step: Array  # int32[], updates done
    params: Any
    opt_state: Any
    key: Array  # typed key; a step's key is fold_in(key, step)
    carry: Any


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as dicts (`role`, `content`, optional `tool_calls`, ...) and the tools offered."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an example came from: what errors and provenance name."""

    path: str
    line: int  # 1-based line of a JSONL file, 1-based index of a JSON list

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Document:
    """One example as tokens, before packing (numpy, host).

    A linear document (SFT, text) has an empty prompt and one completion that is the whole sequence.
    A branching one has a prompt of at least one token and N completions (preference: chosen, rejected).
    """

    prompt: Array  # int32[P]
    completions: tuple[Array, ...]  # int32[C_n] each
    weights: tuple[Array, ...]  # f32[C_n] each: loss weight of each token as a target
    example_id: int  # index in the data source
    origin: Origin
    token: dict[str, tuple[Array, ...]] = dataclasses.field(default_factory=dict)  # f32[C_n] per completion
    completion: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # one per completion
    transform: str = ""  # what became of the record: its format, and whether it is whole, cut or a piece

    @property
    def linear(self) -> bool:
        return len(self.prompt) == 0

    @property
    def cost(self) -> int:
        """Tokens this document takes in a row."""
        if self.linear:
            return len(self.completions[0])
        return len(self.prompt) - 1 + sum(1 + len(c) for c in self.completions)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What an engine returns for one prompt (numpy)."""

    tokens: Array  # int32[C], without the prompt, the stop token included
    logps: Array  # f32[C], under softmax(logits / temperature), which a trainer computes again (greedy: temperature 1)
    finish_reason: str  # "stop" | "length"
    drawn_logps: Array | None = None  # f32[C], under what the tokens were drawn from: penalties, filters, choices
