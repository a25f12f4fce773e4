"""Data quality: which examples are left out, by their text alone, each with its reason.

What one example shows by itself (lengths, script, refusals, patterns, overlap with evaluation files) is found apart
from the others, in any number of workers; then, among those that are left, duplicates. So the result depends neither on
workers nor, but for which of several equal texts is the one kept, on the order.
"""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from jaxpost.data.formats import Example
from jaxpost.data.quality.contamination import Evaluation
from jaxpost.data.quality.duplicates import Fingerprints, find_duplicates
from jaxpost.data.quality.filters import Filters
from jaxpost.data.quality.removal import REASONS, Removal
from jaxpost.data.quality.texts import texts_of
from jaxpost.keys import QualityConfig

NAME = "data_removed.jsonl"  # in a run folder
__all__ = ["NAME", "REASONS", "Look", "Removal", "select", "write"]


def select(
    examples: Iterable[Example], settings: QualityConfig, *, cache=None, map: Callable = map
) -> tuple[np.ndarray, list[Removal]]:
    """Which examples to keep, bool[examples], and what is removed, in the order of the examples.

    An example has the first reason of REASONS that fits. Of equal texts the first is kept, of similar ones the longest.

    cache: folder for what is remembered of large evaluation files. map: an order-keeping map, such as that of a pool.
    Raises DataError: an evaluation file that cannot be read, a package that is missing.
    """
    look = Look(settings, Evaluation.read(settings, cache) if settings.decontaminate else None)
    removed: dict[int, Removal] = {}
    seen: list[Fingerprints | None] = []
    for index, found in enumerate(map(look, examples)):
        if isinstance(found, Removal):
            removed[index] = found
        seen.append(None if isinstance(found, Removal) else found)
    removed |= find_duplicates(seen, settings)
    kept = np.ones(len(seen), bool)
    kept[list(removed)] = False
    return kept, [removed[index] for index in sorted(removed)]


class Look:
    """What one example shows by itself: a Removal, or the Fingerprints that the search for duplicates needs."""

    def __init__(self, settings: QualityConfig, evaluation: Evaluation | None):
        self._settings, self._evaluation = settings, evaluation
        self._filters = Filters(settings)

    def __call__(self, example: Example) -> Removal | Fingerprints:
        texts = texts_of(example)
        if found := self._filters(texts):
            return found
        if self._evaluation is not None and (found := self._evaluation.find(texts)):
            return found
        return Fingerprints.of(texts, self._settings)


def write(removals: Sequence[Removal], path: epath.PathLike) -> None:
    """One JSON object a line: path, line, reason, and what the reason rests on."""
    lines = (
        json.dumps({"path": r.origin.path, "line": r.origin.line, "reason": r.reason, **r.detail}, ensure_ascii=False)
        for r in removals
    )
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).write_text("".join(f"{line}\n" for line in lines))
