"""The words of an example, by who says them."""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Sequence

from jaxpost.data.formats import Example
from jaxpost.types import Conversation, Origin

# Scripts that are written without spaces: each character counts as a word.
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


@dataclasses.dataclass(frozen=True)
class Texts:
    """prompt: None where there is none. answers: what each completion says, its assistant turns together.
    parts: every text, as (which completion, text), 0 being the prompt. labels: of completions, where they have any."""

    origin: Origin
    kind: str
    prompt: str | None
    answers: tuple[str, ...]
    parts: tuple[tuple[int, str], ...]
    labels: tuple[float, ...]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The answers that training makes likelier: of a pair or a ranking the best, of feedback what is good."""
        if self.kind in ("preference", "ranking"):
            return self.answers[:1]
        if self.kind == "unpaired":
            return tuple(answer for answer, label in zip(self.answers, self.labels, strict=True) if label)
        return self.answers

    @property
    def whole(self) -> str:
        return "\n".join(text for _, text in self.parts)


def texts_of(example: Example) -> Texts:
    """Of a conversation, the prompt is what users say before the answers or, where all of it is trained on, between
    them; system messages and tool output are in `parts` alone."""
    seen = example.prompt.messages if isinstance(example.prompt, Conversation) else ()
    between = example.completions[0] if example.kind == "chat" else ()
    asked = [_said(message) for message in (*seen, *between) if message["role"] == "user"]
    parts, answers = [(0, _said(message)) for message in seen], []
    if isinstance(example.prompt, str):
        asked, parts = [example.prompt], [(0, example.prompt)]
    for number, completion in enumerate(example.completions, start=1):
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        answers.append("\n".join(_said(turn) for turn in turns if turn["role"] == "assistant"))
        parts += [(number, _said(turn)) for turn in turns]
    return Texts(
        origin=example.origin,
        kind=example.kind,
        prompt="\n".join(asked) if asked else None,
        answers=tuple(answers),
        parts=tuple(parts),
        labels=tuple(example.values.get("label", ())),
    )


def _said(message: dict) -> str:
    calls = message.get("tool_calls")
    said = message.get("content") or ""
    return said + (json.dumps(calls, sort_keys=True, ensure_ascii=False) if calls else "")


def normal(text: str) -> str:
    """One writing of what reads the same: case, compatibility forms, and white space do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Without punctuation, in the same one writing."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(found: Sequence[str], n: int) -> list[str]:
    """All runs of n words, none where there are fewer."""
    return [" ".join(found[start : start + n]) for start in range(len(found) - n + 1)]
