"""Filters that look at one example: lengths, script, refusals, patterns."""

import functools
import re
import unicodedata

from jaxpost.data.quality.removal import Removal
from jaxpost.data.quality.texts import Texts, normal, words
from jaxpost.keys import QualityConfig

BEGINNING = 200  # characters of an answer in which a refusal stands
REFUSALS = (
    "i'm sorry, but",
    "i am sorry, but",
    "i apologize, but",
    "as an ai",
    "as a language model",
    "as a large language model",
    "i cannot assist",
    "i can't assist",
    "i cannot help with",
    "i can't help with",
    "i cannot fulfill",
    "i can't fulfill",
    "i cannot provide",
    "i can't provide",
    "i'm unable to",
    "i am unable to",
    "i'm not able to",
    "i am not able to",
    "my programming does not allow",
)


class Filters:
    """`filters(texts)` is the first Removal that the settings ask for, or None."""

    def __init__(self, settings: QualityConfig):
        self._settings = settings
        phrases = "|".join(re.escape(_plain(phrase)) for phrase in (*REFUSALS, *settings.refusal_phrases))
        self._refusals = re.compile(rf"(?<!\w)({phrases})(?!\w)")
        self._drop = [re.compile(pattern) for pattern in settings.drop_matching]
        self._keep = [re.compile(pattern) for pattern in settings.keep_matching]

    def __call__(self, texts: Texts) -> Removal | None:
        for reason, check in (
            ("prompt_length", self._prompt_length),
            ("answer_length", self._answer_length),
            ("script", self._script),
            ("refusal", self._refusal),
            ("matches_pattern", self._matches),
            ("lacks_pattern", self._lacks),
        ):
            if detail := check(texts):
                return Removal(texts.origin, reason, detail)
        return None

    def _prompt_length(self, texts: Texts) -> dict | None:
        s = self._settings
        return None if texts.prompt is None else _outside(texts.prompt, s.prompt_characters, s.prompt_words)

    def _answer_length(self, texts: Texts) -> dict | None:
        s = self._settings
        found = (_outside(answer, s.answer_characters, s.answer_words) for answer in texts.answers)
        return next(filter(None, found), None)

    def _script(self, texts: Texts) -> dict | None:
        if not self._settings.scripts:
            return None
        found = [script for script in map(script_of, texts.whole) if script]
        share = sum(script in self._settings.scripts for script in found) / len(found) if found else 1.0
        return {"share": round(share, 3)} if share < self._settings.script_share else None

    def _refusal(self, texts: Texts) -> dict | None:
        if not self._settings.drop_refusals:
            return None
        found = (self._refusals.search(_plain(answer[:BEGINNING])) for answer in texts.wanted)
        return next(({"phrase": match[0]} for match in found if match), None)

    def _matches(self, texts: Texts) -> dict | None:
        for pattern in self._drop:
            for _, text in texts.parts:
                if found := pattern.search(text):
                    return {"pattern": pattern.pattern, "match": found[0][:80]}
        return None

    def _lacks(self, texts: Texts) -> dict | None:
        if not self._keep or any(pattern.search(text) for pattern in self._keep for _, text in texts.parts):
            return None
        return {"patterns": [pattern.pattern for pattern in self._keep]}


def _outside(text: str, characters: tuple[int, int] | None, most_words: tuple[int, int] | None) -> dict | None:
    if characters and not characters[0] <= len(text) <= characters[1]:
        return {"characters": len(text)}
    if most_words and not most_words[0] <= (count := len(words(text))) <= most_words[1]:
        return {"words": count}
    return None


def _plain(text: str) -> str:
    """One writing, with the apostrophe of typewriters."""
    return normal(text.replace("\u2019", "'"))


@functools.cache
def script_of(character: str) -> str | None:
    """The script of a letter by its Unicode name ("CYRILLIC SMALL LETTER ..."); None where it is no letter."""
    if not character.isalpha():
        return None
    first = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
    return {"CJK": "Han"}.get(first, first.capitalize())
