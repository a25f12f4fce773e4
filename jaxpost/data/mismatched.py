"""Answers to other prompts: each document of one completion gets another's as its second, for KTO's estimate."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxpost.types import Document

STREAM = 7  # of the seeded bits: no other draw of a run uses it


class Mismatched(Sequence):
    """`documents` (one completion each) with the completion of a document of another prompt as a second one.

    Who meets whom is drawn by the seed and is the same in every epoch: the documents form a cycle, and each takes the
    next one whose prompt differs. A second completion that does not fit behind the prompt is cut at its end, and left
    out where nothing fits or no other prompt exists. Its label is 0 and means nothing.

    max_tokens: of prompt and one completion. row_tokens: of a document in a row.
    """

    def __init__(self, documents: Sequence[Document], *, max_tokens: int, row_tokens: int, seed: int):
        self._documents = documents
        lengths = np.array([(len(d.prompt), len(d.completions[0])) for d in documents], np.int64).reshape(-1, 2)
        self._partner = _partners([d.prompt.tobytes() for d in documents], seed)
        prompts, own, other = lengths[:, 0], lengths[:, 1], lengths[self._partner, 1]
        room = np.minimum(max_tokens - prompts, row_tokens - (prompts - 1) - (1 + own) - 1)
        alone = self._partner == np.arange(len(lengths))
        self._taken = np.where(alone, 0, np.clip(np.minimum(room, other), 0, None))
        self.cut = int(((self._taken < other) & ~alone).sum())  # how many do not fit whole
        self.alone = int((self._taken == 0).sum())  # how many have none

    def __len__(self) -> int:
        return len(self._documents)

    def __getattr__(self, name: str):
        """What else the documents know (`mixture`, `entries`, ...) holds for these too."""
        return getattr(self._documents, name)

    def members(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices, costs) of the documents of these entries, in their order."""
        indices, costs = self._documents.members(entries)
        return indices, costs + np.where(self._taken[indices], 1 + self._taken[indices], 0)

    def __getitem__(self, index: int) -> Document:
        document, taken = self._documents[index], int(self._taken[index])
        if not taken:
            return document
        other = self._documents[int(self._partner[index])]
        return dataclasses.replace(
            document,
            completions=(*document.completions, other.completions[0][:taken]),
            weights=(*document.weights, other.weights[0][:taken]),
            completion={name: (*values, 0.0) for name, values in document.completion.items()},
        )


def _partners(prompts: Sequence[bytes], seed: int) -> np.ndarray:
    """int64[n]: the next one in a seeded cycle whose prompt differs, oneself where there is none."""
    count = len(prompts)
    cycle = np.argsort(np.random.Philox(key=[seed, STREAM]).random_raw(count), kind="stable").tolist()
    partner = np.arange(count)
    following = None  # the nearest one behind, in the cycle, with another prompt than the one at hand
    for place in reversed(range(2 * count)):  # twice round, for what follows the last
        index, after = cycle[place % count], cycle[(place + 1) % count]
        if prompts[after] != prompts[index]:
            following = after
        if following is not None:
            partner[index] = following
    return partner
