"""Mixtures: which examples an epoch takes from which source, by weights and by budgets of tokens."""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np

from jaxpost.errors import ConfigError, DataError

BUDGET_KEY = [
    0x6A617870,
    0x6F7374,
]  # of the draw that a budget cuts; fixed, so that a run's seed changes the order alone


@dataclasses.dataclass(frozen=True)
class Mixture:
    """entries: example ids in order, repeated or left out by the amounts, int64[E]; what an epoch is a permutation of.

    An example id counts the records of all sources one after another; first_ids [S + 1] is where each source begins.
    sizes: examples of each source that there are to pass over.
    """

    names: tuple[str, ...]
    first_ids: np.ndarray
    sizes: np.ndarray
    entries: np.ndarray

    def sources(self, entries: np.ndarray) -> np.ndarray:
        """The source of each of these entries (indices into `entries`)."""
        return self.source_of(self.entries[entries])

    def source_of(self, example_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.first_ids, example_ids, side="right") - 1

    def without(self, example_ids: np.ndarray) -> "Mixture":
        """The mixture less some examples, in all their repetitions."""
        gone = np.bincount(self.source_of(example_ids), minlength=len(self.names))
        return dataclasses.replace(
            self, entries=self.entries[~np.isin(self.entries, example_ids)], sizes=self.sizes - gone
        )


def amounts(paths) -> list[tuple[str, float | dict]]:
    """`paths` of `load_dataset` as (path, weight) and (path, {"tokens": budget}) pairs. Raises DataError."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    pairs = [(p, 1.0) if isinstance(p, str | os.PathLike) else tuple(p) for p in paths]
    for path, amount in pairs:
        budget = isinstance(amount, Mapping)
        value = amount["tokens"] if budget else amount
        if not (value > 0 and math.isfinite(value)):
            word = "token budget" if budget else "weight"
            raise DataError(f"{path}: the {word} of a file must be above 0, found {value}")
    if not pairs:
        raise DataError("data.train: no files given")
    return pairs


def mix(names: tuple[str, ...], counts: list[int], pairs, tokens=None) -> Mixture:
    """The mixture of sources with this many records each.

    tokens: int64 for every record, what its documents take in rows (0: dropped); needed by budgets alone.
    """
    first_ids = np.cumsum([0, *counts])
    entries = []
    for (path, amount), first, count in zip(pairs, first_ids[:-1], counts, strict=True):
        if isinstance(amount, Mapping):
            chosen = _within(tokens[first : first + count], amount["tokens"], path)
        else:
            places = np.arange(count)
            copies = np.floor((places + 1) * float(amount)) - np.floor(places * float(amount))
            chosen = np.repeat(places, copies.astype(np.int64))
        entries.append(first + chosen)
    return Mixture(names, first_ids, np.array(counts), np.concatenate(entries))


def _within(tokens: np.ndarray, budget: int, path) -> np.ndarray:
    """Places of examples that together take as near to `budget` tokens as whole examples allow without exceeding it.

    All of them as often as they fit whole; of the rest a draw without regard to length, until it is full.
    """
    total = int(tokens.sum())
    if total == 0:
        raise DataError(f"{path}: nothing left to take {budget} tokens from")
    whole, rest = divmod(int(budget), total)
    order = np.argsort(np.random.Philox(key=BUDGET_KEY).random_raw(len(tokens)), kind="stable")
    order = order[tokens[order] > 0]
    chosen = order[np.cumsum(tokens[order]) <= rest]
    if whole == 0 and len(chosen) == 0:
        raise ConfigError(f"data.train: tokens={budget} of {path} is less than its first example drawn; ask for more")
    return np.sort(np.concatenate([np.tile(np.arange(len(tokens)), whole), chosen]), kind="stable")
