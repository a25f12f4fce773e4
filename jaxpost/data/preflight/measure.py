"""Lengths, duplicates and padding of documents: what the numbers of `jaxpost check` are made of."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from jaxpost.types import Document, Origin

PERCENTILES = (50, 90, 99, 100)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens, int64[n] each, one value for every completion of every document (one for a question without any).

    prompt: before the first trained token. completion: the trained tokens. whole: the sequence, seen tokens between
    and behind the trained ones included.
    """

    prompt: np.ndarray
    completion: np.ndarray
    whole: np.ndarray

    def rows(self) -> list[tuple[str, list[int]]]:
        """(name, the tokens at PERCENTILES) of each."""
        series = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, np.percentile(values, PERCENTILES, method="higher").tolist()) for name, values in series]


def measure(documents: Iterable[Document]) -> Lengths:
    """The lengths of all sequences of the documents."""
    found = np.array([lengths for document in documents for lengths in _lengths(document)], np.int64)
    return Lengths(*found.T)


def _lengths(document: Document) -> Iterator[tuple[int, int, int]]:
    if not document.completions:  # a question
        yield len(document.prompt), 0, len(document.prompt)
    for completion, weights in zip(document.completions, document.weights, strict=True):
        trained = np.flatnonzero(weights)
        first = int(trained[0]) if len(trained) else len(completion)
        yield len(document.prompt) + first, len(trained), len(document.prompt) + len(completion)


def duplicates(documents: Iterable[Document]) -> list[tuple[Origin, Origin]]:
    """(document, the first one with the same tokens) of every document that repeats another example."""
    first: dict[bytes, tuple[int, Origin]] = {}
    found = {}
    for document in documents:
        parts = (document.prompt, *document.completions)
        digest = hashlib.blake2b(repr([len(part) for part in parts]).encode(), digest_size=16)
        for part in parts:
            digest.update(np.ascontiguousarray(part))
        example_id, origin = first.setdefault(digest.digest(), (document.example_id, document.origin))
        if example_id != document.example_id:  # a weight above 1 repeats an example, and is meant to
            found[document.example_id] = (document.origin, origin)
    return list(found.values())
