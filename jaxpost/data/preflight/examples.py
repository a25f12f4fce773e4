"""What only the examples themselves can tell: are the trained tokens those of the assistant, and all of them?

The code that makes the masks is not asked. Every example is rendered once more in disguise: with other letters in all
that the model is only to read. The trained tokens must be the same ones; where they are not, somebody else's words are
among them, or some of the assistant's are missing. The other way round, they must change with each tool call.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence

import numpy as np

from jaxpost.data.dataset import Dataset
from jaxpost.data.encode import encode
from jaxpost.data.formats import Example, ExampleFault
from jaxpost.data.preflight.findings import NOT_CHECKED, Problem
from jaxpost.data.templates import Template
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.types import Conversation, Document

# Letters and digits, but neither <tags> nor /switches: templates look for them.
WORDS = re.compile(r"<[^<>]*>|/\w+|\w")
RAW_KEPT = 16  # last characters of a raw prompt that keep their letters: the first trained token may begin in them
SNIPPET = 8  # tokens shown of what should not be trained


def check_examples(
    dataset: Dataset, tokenizer: Tokenizer, template: Template, most: int | None = None
) -> tuple[int, list[Problem]]:
    """(examples rendered again, their problems): seen_trained, header_trained, completion_lost, not_shown,
    prompt_not_prefix; where there are none, not_checked of an example that the template refuses in disguise."""
    problems, rendered = [], 0
    for document in dataset.documents if most is None else dataset.documents.sample(most):
        example = dataset.example(document.example_id)
        if example.prompt is None:  # raw text: all of it is trained
            continue
        rendered += 1
        view = _View(document, _part_of(example, document), tokenizer, template)
        found = view.check_mask() or view.check_header()
        found += [*view.check_calls(), *view.check_shown(), *view.check_prompt()]
        problems += found or view.not_checked()
    return rendered, problems


def _part_of(example: Example, document: Document) -> Example:
    """The example with the completions of this document alone: of a pair read as unpaired feedback, the one."""
    if example.kind != "unpaired":
        return example
    (label,) = document.completion["label"]
    completion = example.completions[example.values["label"].index(label)]
    return dataclasses.replace(example, completions=(completion,), values={"label": (label,)})


class _View:
    """One example beside its document; each check returns its problems."""

    def __init__(self, document: Document, example: Example, tokenizer: Tokenizer, template: Template):
        self._example, self._tokenizer, self._template = example, tokenizer, template
        self._document, self._trained = document, _trained(document)
        self._refused: str | None = None  # why the template did not take what was made of the example

    def check_mask(self) -> list[Problem]:
        """The trained tokens do not change with what is only read."""
        example, got, wanted = self._example, self._trained, self._trained_of(disguise(self._example))
        if wanted is None or got == wanted:
            return []
        for ours, theirs in zip(got, wanted, strict=True):
            if len(ours) < len(theirs) and ours in (theirs[: len(ours)], theirs[-len(ours) :]):
                detail = f"only {len(ours)} of the {len(theirs)} tokens to train on are left"
                return [Problem("completion_lost", detail, example.origin)]
        changed = lambda number: self._trained_of(disguise(example, number)) not in (got, None)  # noqa: E731
        culprit = next((name for n, name in enumerate(_seen(example)) if changed(n)), "the prompt")
        detail = f"{culprit} is trained on, such as {_foreign(got, wanted, self._tokenizer)!r}"
        return [Problem("seen_trained", detail, example.origin)]

    def check_header(self) -> list[Problem]:
        """In each run of trained tokens only white space stands behind the last one at which generation stops."""
        for completion, weights in zip(self._document.completions, self._document.weights, strict=True):
            edges = np.flatnonzero(np.diff(np.asarray(weights) > 0, prepend=False, append=False))
            for start, end in edges.reshape(-1, 2):
                stops = np.flatnonzero(np.isin(completion[start:end], self._tokenizer.stop_ids))
                behind = completion[start + stops[-1] + 1 : end] if len(stops) else ()
                text = self._tokenizer.decode(behind, skip_special=False)
                if text.strip():
                    detail = f"{text!r}, behind the end of a turn, is trained"
                    return [Problem("header_trained", detail, self._document.origin)]
        return []

    def check_calls(self) -> list[Problem]:
        """The trained tokens change with every tool call that the model is to learn."""
        for index, completion in enumerate(self._example.completions):
            for place, message in enumerate(completion):
                if not isinstance(message, dict) or not message.get("tool_calls"):
                    continue
                without = {**message, "tool_calls": [_renamed(call) for call in message["tool_calls"]]}
                changed = (*completion[:place], without, *completion[place + 1 :])
                others = (*self._example.completions[:index], changed, *self._example.completions[index + 1 :])
                if self._trained_of(dataclasses.replace(self._example, completions=others)) == self._trained:
                    number = 1 + len(self._example.prompt.messages) + place
                    detail = f"the template leaves out the tool calls of message {number}"
                    return [Problem("completion_lost", detail, self._example.origin)]
        return []

    def check_shown(self) -> list[Problem]:
        """The template shows the tools that are offered, and what the assistant thinks before its last answer."""
        if not isinstance(self._example.prompt, Conversation):
            return []
        seen, tools = self._example.prompt.messages, self._example.prompt.tools
        details = [self._template.not_shown((*seen, *completion), tools) for completion in self._example.completions]
        return [Problem("not_shown", detail, self._example.origin) for detail in details if detail][:1]

    def check_prompt(self) -> list[Problem]:
        """The prompt that the template gives in use begins the text that is trained on, at every trained turn."""
        if not isinstance(self._example.prompt, Conversation):
            return []
        seen, tools = self._example.prompt.messages, self._example.prompt.tools
        for completion in self._example.completions:
            detail = self._template.generation_prefix_fault((*seen, *completion), tools, trained_from=len(seen))
            if detail:
                return [Problem("prompt_not_prefix", detail, self._example.origin)]
        return []

    def not_checked(self) -> list[Problem]:
        if self._refused is None:
            return []
        detail = f"is others' text trained on? The template refuses the example with other letters: {self._refused}"
        return [Problem(NOT_CHECKED, detail, self._example.origin)]

    def _trained_of(self, example: Example) -> list[list[int]] | None:
        """The trained tokens of another example, encoded whole; None where the template refuses it."""
        options = {"template": self._template, "tokenizer": self._tokenizer, "max_tokens": sys.maxsize}
        try:
            (found,) = encode(example, 0, on_long="drop", **options).documents
        except ExampleFault as fault:
            self._refused = fault.detail
            return None
        return _trained(found)


def _trained(document: Document) -> list[list[int]]:
    pairs = zip(document.completions, document.weights, strict=True)
    return [completion[np.asarray(weights) > 0].tolist() for completion, weights in pairs]


def _foreign(got: Sequence[list[int]], wanted: Sequence[list[int]], tokenizer: Tokenizer) -> str:
    """The first trained tokens that the disguise changes, as text."""
    ours, theirs = next(pair for pair in zip(got, wanted, strict=True) if pair[0] != pair[1])
    same = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
    return tokenizer.decode(ours[same : same + SNIPPET], skip_special=False)


def disguise(example: Example, only: int | None = None) -> Example:
    """The example with other letters in everything that is only read, or in the one message `only` of these.

    Messages that are only read: all of the prompt, and those of the completions that are not the assistant's; counted
    through, the prompt first.
    """
    if isinstance(example.prompt, str):
        cut = max(len(example.prompt) - RAW_KEPT, 0)
        return dataclasses.replace(example, prompt=_other_letters(example.prompt[:cut]) + example.prompt[cut:])
    number = 0

    def changed(messages: Sequence[dict], prompt: bool) -> tuple[dict, ...]:
        nonlocal number
        found = []
        for message in messages:
            if prompt or message["role"] != "assistant":
                if only in (None, number):
                    message = {**message, "content": _other_letters(message["content"])}
                number += 1
            found.append(message)
        return tuple(found)

    prompt = dataclasses.replace(example.prompt, messages=changed(example.prompt.messages, prompt=True))
    completions = tuple(changed(completion, prompt=False) for completion in example.completions)
    return dataclasses.replace(example, prompt=prompt, completions=completions)


def _seen(example: Example) -> list[str]:
    """Names of the messages that are only read, in the order of `disguise`."""
    if isinstance(example.prompt, str):
        return []
    prompt = example.prompt.messages
    seen = list(enumerate(prompt, start=1))
    for completion in example.completions:
        numbered = enumerate(completion, start=1 + len(prompt))
        seen += [(place, message) for place, message in numbered if message["role"] != "assistant"]
    return [f"message {place} ({message['role']})" for place, message in seen]


def _renamed(call: dict) -> dict:
    function = call["function"]
    return {**call, "function": {**function, "name": _other_letters(function["name"])}}


def _other_letters(text: str) -> str:
    return WORDS.sub(lambda found: found[0] if len(found[0]) > 1 else "y" if found[0] == "x" else "x", text)
