"""Preflight: documents shown as the model sees them, and checks of what silently ruins a run."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxpost.data.tokenizers import Tokenizer
from jaxpost.types import Document, Origin

# Two shades each, token by token, so that every token can be seen.
TRAINED = ("black on green3", "black on pale_green3")
SEEN = ("white on grey23", "white on grey35")
SPECIAL = "bold magenta"
END_TOKENS = 4  # an end-of-turn token stands among the last so many trained ones (a newline may follow it)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a document: a slug, one line for the user, and where it came from."""

    reason: str
    detail: str
    origin: Origin

    def __str__(self) -> str:
        return f"{self.origin}: {self.detail} ({self.reason})"


def check(
    documents: Sequence[Document], tokenizer: Tokenizer, vocab_size: int, most: int | None = None
) -> list[Problem]:
    """Problems of all documents, or of `most` of them at even distances.

    Reasons: two_bos (a sequence begins with two), empty_mask (a completion without a trained token), no_end_trained
    (no end-of-turn token among the last trained ones: the model never learns to stop; raw text is exempt),
    end_does_not_stop (it ends with a special token at which generation does not stop), beyond_vocabulary (an id that
    the model has no embedding for).
    """
    count = len(documents)
    chosen = range(count) if most is None or most >= count else np.linspace(0, count - 1, most).astype(int).tolist()
    return [problem for index in chosen for problem in _check_document(documents[index], tokenizer, vocab_size)]


def _check_document(document: Document, tokenizer: Tokenizer, vocab_size: int) -> list[Problem]:
    found = {}
    for completion, weights in zip(document.completions, document.weights, strict=True):
        ids = np.concatenate([document.prompt, completion])
        trained = completion[np.asarray(weights) > 0]
        if tokenizer.bos_id is not None and (ids[:2] == tokenizer.bos_id).sum() == 2:
            found["two_bos"] = "begins with two BOS tokens: the chat template writes one and so does something else"
        if ids.max() >= vocab_size:
            found["beyond_vocabulary"] = f"token {ids.max()}, but the model's vocabulary ends at {vocab_size - 1}"
        if len(trained) == 0:
            found["empty_mask"] = "no token of a completion is trained"
        elif not _is_raw_text(document):
            found |= _check_end(trained[-END_TOKENS:].tolist(), tokenizer)
    return [Problem(reason, detail, document.origin) for reason, detail in found.items()]


def _is_raw_text(document: Document) -> bool:
    """All of it is trained: raw text, of which a piece may end anywhere."""
    return document.linear and bool(np.all(document.weights[0][1:] > 0))


def _check_end(last: list[int], tokenizer: Tokenizer) -> dict[str, str]:
    if set(last) & set(tokenizer.stop_ids):
        return {}
    special = [tokenizer.token(index) for index in last if tokenizer.is_special(index)]
    if not special:
        return {"no_end_trained": "the trained text ends without an end-of-turn token: the model never learns to stop"}
    stops = ", ".join(tokenizer.token(index) for index in tokenizer.stop_ids) or "nothing"
    return {"end_does_not_stop": f"a turn ends with {special[-1]}, but generation stops at {stops} only"}


def summary(problems: Sequence[Problem]) -> list[str]:
    """One line for each reason: how many, and the first of them."""
    groups = itertools.groupby(sorted(problems, key=lambda problem: problem.reason), lambda problem: problem.reason)
    lines = []
    for reason, group in groups:
        members = list(group)
        lines.append(f"{reason}: {len(members)} of the documents; first {members[0].origin}: {members[0].detail}")
    return lines


def show_examples(
    documents: Sequence[Document], tokenizer: Tokenizer, n: int, console: Console, most_tokens: int = 400
) -> None:
    """Prints the first n documents token by token: trained ones in colour, special ones bold.

    Where the console has no colours, tokens are parted by "|" and trained ones stand in double brackets. Of a prompt or
    completion longer than `most_tokens` the middle is left out, which is said.
    """
    legend = Text("legend: ")
    for name, styles in (("trained", TRAINED), ("seen", SEEN)):
        legend.append(f" {name} ", styles[0]).append(" ")
    console.print(legend.append("special", SPECIAL), *([] if console.color_system else ["(trained: [[...]])"]))
    for index in range(min(n, len(documents))):
        document = documents[index]
        console.rule(f"example {document.example_id}, {document.origin}")
        parts = list(zip(_names(document), document.completions, document.weights, strict=True))
        if not document.linear:
            parts.insert(0, ("prompt", document.prompt, np.zeros(len(document.prompt))))
        for name, ids, weights in parts:
            trained = np.asarray(weights) > 0
            console.print(Text(f"{name}: {len(ids)} tokens, {trained.sum()} trained", "bold"))
            console.print(_tokens(ids.tolist(), trained.tolist(), tokenizer, console.color_system is None, most_tokens))


def _names(document: Document) -> list[str]:
    if document.linear:
        return ["sequence"]
    if len(document.completions) == 2:
        return ["chosen", "rejected"]
    return [f"completion {n + 1}" for n in range(len(document.completions))]


def _tokens(ids: list[int], trained: list[bool], tokenizer: Tokenizer, colourless: bool, most_tokens: int) -> Text:
    """The tokens as one rich Text."""
    left_out = range(most_tokens // 2, len(ids) - most_tokens // 2) if len(ids) > most_tokens else range(0)
    text = Text(overflow="fold")
    for place, (index, learned) in enumerate(zip(ids, trained, strict=True)):
        if place in left_out:
            text.append(f" ... {len(left_out)} tokens ... " if place == left_out.start else "", "italic")
            continue
        style = (TRAINED if learned else SEEN)[place % 2]
        word = tokenizer.show(index).replace("\n", "⏎\n")
        if colourless:
            begins = learned and (place == 0 or not trained[place - 1])
            ends = learned and (place == len(ids) - 1 or not trained[place + 1])
            word = ("[[" if begins else "") + word + ("]]" if ends else "|")
        text.append(word, f"{style} {SPECIAL}" if tokenizer.is_special(index) else style)
    return text
