"""Documents and rows printed token by token, as the model sees them: trained, only seen, padding."""

import itertools
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxpost.data.loader import Loader
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.types import Document

# Two shades each, token by token, so that every token can be seen.
TRAINED = ("black on green3", "black on pale_green3")
SEEN = ("white on grey23", "white on grey35")
PADDING = "black on orange3"
SPECIAL = {True: "bold purple4", False: "bold plum1"}  # trained, seen: each to be read on its ground
DOTS_SHOWN = 40  # of the empty end of a row
DOCUMENTS_SHOWN = 2  # of a row, and its last one


def show_examples(
    documents: Iterable[Document], tokenizer: Tokenizer, n: int, console: Console, most_tokens: int = 400
) -> None:
    """Prints the first n documents token by token: trained ones in colour, special ones bold.

    Where the console has no colours, tokens are parted by "|" and trained ones stand in double brackets. Of a prompt or
    completion longer than `most_tokens` the middle is left out, which is said.
    """
    show_legend(console)
    for document in itertools.islice(documents, n):
        console.rule(f"example {document.example_id}, {document.origin}")
        parts = list(zip(_names(document), document.completions, document.weights, strict=True))
        if not document.linear:
            parts.insert(0, ("prompt", document.prompt, np.zeros(len(document.prompt))))
        for name, ids, weights in parts:
            trained = np.asarray(weights) > 0
            _show_part(name, ids, trained, tokenizer, console, most_tokens)


def show_row(loader: Loader, tokenizer: Tokenizer, console: Console, most_tokens: int = 60) -> None:
    """Prints a packed row as the step gets it: its documents in order, and the empty end.

    Of the first step's rows it is the emptiest. Of many documents the first and the last few are shown.
    """
    batch, members = loader.batch(0), loader.rows_documents(0)
    row = int(np.argmin([(batch.rows.segments[n] > 0).sum() for n in range(len(members))]))
    tokens, segments, weights = (getattr(batch.rows, name)[row] for name in ("tokens", "segments", "weights"))
    empty, documents = int((segments == 0).sum()), members[row]
    console.rule(f"row {row + 1} of step 1: {len(tokens) - empty} of {len(tokens)} places taken")
    left_out = range(DOCUMENTS_SHOWN, len(documents) - 1)
    for place, index in enumerate(documents):
        if place in left_out:
            if place == left_out.start:
                console.print(Text(f"... {len(left_out)} more documents ...", "italic"))
            continue
        here = segments == place + 1
        name = f"document {place + 1} of {len(documents)}, {loader.documents[index].origin}"
        _show_part(name, tokens[here], weights[here] > 0, tokenizer, console, most_tokens)
    console.print(Text(f"padding: {empty} empty places ", "bold"), Text("·" * min(empty, DOTS_SHOWN), PADDING), sep="")


def show_legend(console: Console) -> None:
    """What the colours mean; where there are none, what stands for them."""
    if console.color_system is None:
        console.print("legend: [[trained]]  seen|  · padding", markup=False, highlight=False)
        return
    legend = Text("legend: ")
    for name, style in (("trained", TRAINED[0]), ("seen", SEEN[0]), ("padding", PADDING)):
        legend.append(f" {name} ", style).append(" ")
    console.print(legend.append("special", SPECIAL[False]))


def _show_part(name: str, ids, trained, tokenizer: Tokenizer, console: Console, most_tokens: int) -> None:
    console.print(Text(f"{name}: {len(ids)} tokens, {trained.sum()} trained", "bold"))
    if len(ids):
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
            begins = learned and (place in (0, left_out.stop) or not trained[place - 1])
            ends = learned and (place in (len(ids) - 1, left_out.start - 1) or not trained[place + 1])
            word = ("[[" if begins else "") + word + ("]]" if ends else "|")
        text.append(word, f"{style} {SPECIAL[learned]}" if tokenizer.is_special(index) else style)
    return text
