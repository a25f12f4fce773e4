"""Decontamination: examples that hold a good part of a text of an evaluation file, by runs of words."""

import collections
import logging

from jaxpost.data.formats import ExampleFault, detect, parse
from jaxpost.data.quality.removal import Removal
from jaxpost.data.quality.texts import Texts, ngrams, texts_of, words
from jaxpost.data.sources import open_source
from jaxpost.errors import DataError
from jaxpost.keys import QualityConfig
from jaxpost.types import Origin

log = logging.getLogger("jaxpost")


class Evaluation:
    """Texts of evaluation files by their runs of n words; texts of fewer words by all of them.

    An example is contaminated by a text if it holds at least `share` of the text's runs, and one at least; by a short
    one, if it has it as a text of its own. Texts of fewer than n/2 words ("Yes.") say nothing and are left out.
    """

    def __init__(self, texts, n: int, share: float):
        """texts: (text, Origin) pairs."""
        self._n, self._share = n, share
        self._runs: dict[str, list[int]] = {}
        self._short: dict[str, Origin] = {}
        self._counts, self._origins = [], []
        for text, origin in texts:
            said = words(text)
            runs = dict.fromkeys(ngrams(said, n))
            if runs:
                for run in runs:
                    self._runs.setdefault(run, []).append(len(self._counts))
                self._counts.append(len(runs))
                self._origins.append(origin)
            elif 2 * len(said) >= n:
                self._short.setdefault(" ".join(said), origin)

    @classmethod
    def read(cls, settings: QualityConfig, cache=None) -> "Evaluation":
        """Of the files `settings.decontaminate`. Raises DataError."""
        texts = (pair for path in settings.decontaminate for pair in _read(path, cache))
        return cls(texts, settings.decontaminate_ngram, settings.decontaminate_share)

    def find(self, texts: Texts) -> Removal | None:
        shared: dict[int, list[str]] = collections.defaultdict(list)
        seen = set()
        for _, text in texts.parts:
            said = words(text)
            if len(said) < self._n:
                if origin := self._short.get(" ".join(said)):
                    return _removal(texts, origin, " ".join(said), 1.0)
                continue
            for run in ngrams(said, self._n):
                if run in self._runs and run not in seen:
                    seen.add(run)
                    for which in self._runs[run]:
                        shared[which].append(run)
        shares = {which: len(runs) / self._counts[which] for which, runs in shared.items()}
        which = max(shares, key=lambda which: (shares[which], -which), default=None)
        if which is None or shares[which] < self._share:
            return None
        return _removal(texts, self._origins[which], shared[which][0], shares[which])


def _removal(texts: Texts, origin: Origin, run: str, share: float) -> Removal:
    return Removal(texts.origin, "contaminated", {"evaluation": str(origin), "ngram": run, "share": round(share, 3)})


def _read(path: str, cache):
    """(text, Origin) of what is said in a file, by its format; where none fits, of every text in its records."""
    source = open_source(path, cache)
    record, origin = source[0]
    try:
        format = detect(record, origin)
    except DataError:
        format = None
        log.info("%s: none of the known formats; every text in its records is compared", path)
    for index in range(len(source)):
        record, origin = source[index]
        for text in _strings(record) if format is None else _said(record, origin, format):
            yield text, origin


def _said(record: dict, origin: Origin, format: str) -> list[str]:
    try:
        example = parse(record, origin, format)
    except ExampleFault:  # a faulty example is an evaluation text all the same
        return list(_strings(record))
    system = [m["content"] for m in getattr(example.prompt, "messages", ()) if m["role"] == "system"]
    return [text for _, text in texts_of(example).parts if text not in system]


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
