"""Duplicates: equal texts by a digest, similar ones by MinHash with locality-sensitive hashing (extra `quality`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from jaxpost.data.quality.removal import Removal
from jaxpost.data.quality.texts import Texts, ngrams, normal, words
from jaxpost.data.sources.base import require
from jaxpost.keys import QualityConfig
from jaxpost.types import Origin

SEED = 1  # of the permutations


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """What a search for duplicates needs of an example. digest: of its texts in one writing; length: in characters;
    minhash: uint32[permutations], or None where near duplicates are not looked for or nothing has a word."""

    origin: Origin
    digest: bytes
    length: int
    minhash: np.ndarray | None

    @classmethod
    def of(cls, texts: Texts, settings: QualityConfig) -> "Fingerprints":
        parts = [(which, normal(text)) for which, text in texts.parts]
        digest = hashlib.sha256(json.dumps([parts, texts.labels]).encode()).digest()
        minhash = None
        if settings.near_duplicates is not None:
            minhash = _minhash(_shingles(texts, settings.near_ngram), settings.near_permutations)
        return cls(texts.origin, digest, sum(len(text) for _, text in parts), minhash)


def _shingles(texts: Texts, n: int) -> set[str]:
    """Runs of n words of each text (all of a shorter one), marked with the completion they are of and its label: a pair
    the other way round is no duplicate."""
    found = set()
    for which, text in texts.parts:
        label = texts.labels[which - 1] if which and texts.labels else ""
        said = words(text)
        found |= {f"{which} {label} {gram}" for gram in ngrams(said, min(n, len(said)) or 1)}
    return found


def _minhash(shingles: set[str], permutations: int) -> np.ndarray | None:
    if not shingles:
        return None
    made = _empty(permutations)
    made.update_batch(shingle.encode() for shingle in sorted(shingles))
    return made.hashvalues


def _empty(permutations: int):
    return _template(permutations).copy()


@functools.cache
def _template(permutations: int):
    """Made once: drawing the permutations takes longer than to hash a short text."""
    datasketch = require("datasketch", "quality", "data.quality.near_duplicates")
    return datasketch.MinHash(num_perm=permutations, seed=SEED)


def find_duplicates(found: Sequence[Fingerprints | None], settings: QualityConfig) -> dict[int, Removal]:
    """{index: Removal} among those that are not None."""
    removed: dict[int, Removal] = {}
    left = [index for index, one in enumerate(found) if one is not None]
    if settings.exact_duplicates:
        first: dict[bytes, int] = {}
        for index in left:
            kept = first.setdefault(found[index].digest, index)
            if kept != index:
                detail = {"kept": str(found[kept].origin)}
                removed[index] = Removal(found[index].origin, "exact_duplicate", detail)
        left = list(first.values())
    if settings.near_duplicates is not None:
        removed |= _near(found, left, settings)
    return removed


def _near(found: Sequence[Fingerprints], left: list[int], settings: QualityConfig) -> dict[int, Removal]:
    """Each is held against those kept so far, longest first: what is removed is always similar to one that is kept, and
    the same texts are kept whatever their order."""
    datasketch = require("datasketch", "quality", "data.quality.near_duplicates")
    threshold = settings.near_duplicates
    # What the index finds is held against the threshold, so that it may find too much rather than too little.
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=settings.near_permutations, weights=(0.1, 0.9))
    removed, kept = {}, {}
    left = [n for n in left if found[n].minhash is not None]
    for n in sorted(left, key=lambda n: (-found[n].length, found[n].digest, n)):
        one = _empty(settings.near_permutations)
        one.hashvalues = found[n].minhash
        similar = {m: one.jaccard(kept[m]) for m in index.query(one)}
        nearest = max(similar, key=lambda m: (similar[m], -m), default=None)
        if nearest is not None and similar[nearest] >= threshold:
            detail = {"kept": str(found[nearest].origin), "similarity": round(similar[nearest], 3)}
            removed[n] = Removal(found[n].origin, "near_duplicate", detail)
        else:
            kept[n] = one
            index.insert(n, one)
    return removed
