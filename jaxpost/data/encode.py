"""Encoding: an `Example` becomes `Document`s. Each sequence is rendered once and tokenised once, as a whole.

A token is trained iff its last character lies in a trained span: a token that begins in the generation prompt and ends
in the answer (" Yes") is trained, one that ends in the next user turn is not. The first token of a sequence never is.
BOS stands at the beginning exactly once: the template's, else one is put there if the tokenizer adds one.

Over-long sequences (prompt and one completion beyond `max_tokens`): `on_long="drop"` raises the fault `too_long`;
"truncate" cuts the prompt (all before the first trained token) from the left and keeps BOS. A completion is never cut:
where the prompt gives too little, the example is `too_long` all the same. Raw text without a prompt is cut into
consecutive pieces under either setting; each piece after the first begins with the last token of the piece before,
untrained, so that every token is trained once.
"""

import dataclasses
import itertools

import numpy as np

from jaxpost.data.formats import Example, ExampleFault
from jaxpost.data.templates import Rendered, Template
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.types import Document

BRANCHING = ("preference", "ranking", "unpaired")  # kinds whose completions branch off a shared prompt
NO_PROMPT = np.zeros(0, np.int32)  # of a linear document


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One whole sequence: int32[T] ids and bool[T], which are trained."""

    ids: np.ndarray
    trained: np.ndarray

    def __getitem__(self, part: slice) -> "Sequence":
        return Sequence(self.ids[part], self.trained[part])

    @property
    def first_trained(self) -> int:
        return int(np.argmax(self.trained))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The documents of one example. truncated: its prompt has lost tokens."""

    documents: list[Document]
    truncated: bool


def encode(
    example: Example, example_id: int, *, template: Template, tokenizer: Tokenizer, max_tokens: int, on_long: str
) -> Encoded:
    """The documents of an example: one, the pieces of a long raw text, or one for each completion of unpaired feedback.

    max_tokens: of prompt and one completion together. on_long: "truncate" or "drop" (see module).
    Raises ExampleFault: too_long, empty_mask, no_prompt, chosen_equals_rejected, equal_completions, and what the
    template refuses.
    """
    try:
        sequences = [_sequence(example, completion, template, tokenizer) for completion in example.completions]
        if not all(sequence.trained.any() for sequence in sequences):
            raise ExampleFault("empty_mask", "no token of it would be trained")
        if example.kind == "prompt":
            sequences = [_question(example, template, tokenizer)]
            parts = [(_cut(sequences[0].ids, len(sequences[0].ids) - max_tokens, tokenizer.bos_id, on_long), [])]
        elif example.kind == "unpaired":
            _check_distinct(sequences, example.kind)
            parts = [_branches([sequence], tokenizer.bos_id, max_tokens, on_long) for sequence in sequences]
        elif example.kind in BRANCHING:
            _check_distinct(sequences, example.kind)
            parts = [_branches(sequences, tokenizer.bos_id, max_tokens, on_long)]
        elif example.kind == "text" and example.prompt is None:
            parts = [(NO_PROMPT, [piece]) for piece in _pieces(sequences[0], max_tokens)]
        else:
            parts = [(NO_PROMPT, [_shortened(sequences[0], tokenizer.bos_id, max_tokens, on_long)])]
        steps = _step_ends(example, template, tokenizer) if example.steps else ()
    except ExampleFault as fault:
        raise ExampleFault(fault.reason, fault.detail, example.origin) from None
    excess = max(len(sequence.ids) for sequence in sequences) - max_tokens
    truncated = excess > 0 and example.prompt is not None
    change = f"prompt cut by {excess} tokens" if truncated else "whole"
    part = "answer" if example.kind == "unpaired" else "piece"
    documents = [
        Document(
            prompt=prompt,
            completions=tuple(part.ids for part in completions),
            weights=tuple(part.trained.astype(np.float32) for part in completions),
            example_id=example_id,
            origin=example.origin,
            transform=f"{example.format}, " + (f"{part} {n} of {len(parts)}" if len(parts) > 1 else change),
            completion={} if steps else _values_of(example, n - 1),
            token=_step_values(example, steps, len(completions[0].ids)) if steps else {},
        )
        for n, (prompt, completions) in enumerate(parts, start=1)
    ]
    return Encoded(documents, truncated)


def _values_of(example: Example, part: int) -> dict[str, tuple[float, ...]]:
    """The values of a document's completions: all of the example's, unless each completion is a document."""
    if example.kind != "unpaired":
        return example.values
    return {name: values[part : part + 1] for name, values in example.values.items()}


def _sequence(example: Example, completion, template: Template, tokenizer: Tokenizer) -> Sequence:
    """Prompt and one completion, as text with spans, then as tokens."""
    return _tokenize(_rendered(example, completion, template, tokenizer), tokenizer)


def _rendered(example: Example, completion, template: Template, tokenizer: Tokenizer) -> Rendered:
    if isinstance(completion, str):
        prompt = example.prompt or ""
        end = tokenizer.special_tokens.get("eos_token", "")
        text = prompt + completion + ("" if end and completion.endswith(end) else end)
        return Rendered(text, ((len(prompt), len(text)),))
    messages, tools, seen = (*example.prompt.messages, *completion), example.prompt.tools, len(example.prompt.messages)
    template.check_ends(messages, trained_from=seen)
    return template.render(messages, tools, trained_from=seen)


def _step_ends(example: Example, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Where each step ends: how many tokens from the end of the sequence the token with its last character stands."""
    rendered = _rendered(example, example.completions[0], template, tokenizer)
    ids, offsets = tokenizer.encode_with_offsets(rendered.text, rendered.breaks)
    start = rendered.text.rfind("\n".join(example.steps))
    if start < 0:
        raise ExampleFault("steps_not_shown", "the template does not show the steps as they are written")
    ends = start + np.cumsum([len(step) + 1 for step in example.steps]) - 1
    places = np.searchsorted([end for _, end in offsets], ends)
    if len(set(places.tolist())) < len(places):
        raise ExampleFault("steps_share_a_token", "two steps end within one token")
    return (len(ids) - places).tolist()


def _step_values(example: Example, ends: list[int], length: int) -> dict[str, tuple[np.ndarray]]:
    """Per token: `step` is 1 at the end of each step, `label` its label there; 0 elsewhere."""
    step, label = np.zeros(length, np.float32), np.zeros(length, np.float32)
    places = length - np.array(ends)
    step[places], label[places] = 1, example.values["label"]
    return {"step": (step,), "label": (label,)}


def _question(example: Example, template: Template, tokenizer: Tokenizer) -> Sequence:
    """The prompt alone, as the model is asked it."""
    if isinstance(example.prompt, str):
        ids = tokenizer.with_bos(tokenizer.encode(example.prompt))
    else:
        messages, tools = example.prompt.messages, example.prompt.tools
        ids = template.encode(messages, tokenizer, tools, add_generation_prompt=True)
    return Sequence(np.array(ids, np.int32), np.zeros(len(ids), bool))


def _tokenize(rendered: Rendered, tokenizer: Tokenizer) -> Sequence:
    ids, offsets = tokenizer.encode_with_offsets(rendered.text, rendered.breaks)
    ends = np.array([end for _, end in offsets], np.int64)
    trained = np.zeros(len(ids), bool)
    for start, end in rendered.spans:
        trained |= (ends > start) & (ends <= end)
    whole = tokenizer.with_bos(ids)
    trained = np.concatenate([np.zeros(len(whole) - len(ids), bool), trained])
    trained[:1] = False  # nothing comes before it to predict it from
    return Sequence(np.array(whole, np.int32), trained)


def _pieces(sequence: Sequence, max_tokens: int) -> list[Sequence]:
    pieces = []
    for start in range(0, len(sequence.ids) - 1, max_tokens - 1):
        trained = sequence.trained[start : start + max_tokens].copy()
        trained[0] = False
        pieces.append(Sequence(sequence.ids[start : start + max_tokens], trained))
    return pieces


def _shortened(sequence: Sequence, bos: int | None, max_tokens: int, on_long: str) -> Sequence:
    prompt = sequence[: sequence.first_trained]
    kept = _cut(prompt.ids, len(sequence.ids) - max_tokens, bos, on_long)
    rest = sequence[len(prompt.ids) :]
    return Sequence(np.concatenate([kept, rest.ids]), np.concatenate([np.zeros(len(kept), bool), rest.trained]))


def _check_distinct(sequences: list[Sequence], kind: str) -> None:
    if any(np.array_equal(a.ids, b.ids) for a, b in itertools.combinations(sequences, 2)):
        if kind == "preference":
            raise ExampleFault("chosen_equals_rejected", "chosen and rejected have the same tokens")
        raise ExampleFault("equal_completions", "two of the completions have the same tokens")


def _branches(
    sequences: list[Sequence], bos: int | None, max_tokens: int, on_long: str
) -> tuple[np.ndarray, list[Sequence]]:
    """The shared prompt and the completions.

    The prompt is the common beginning of the whole tokenisations, no further than the last token before the first
    trained one: where an answer's first letters change how the prompt's end is tokenised, that end is not shared.
    """
    first = sequences[0].ids
    shared = min(sequence.first_trained for sequence in sequences)
    for other in sequences[1:]:
        differing = np.flatnonzero(first[:shared] != other.ids[:shared])  # all are at least `shared` long
        shared = differing[0] if len(differing) else shared
    if shared == 0:
        raise ExampleFault("no_prompt", "the completions have no token in common to begin with")
    excess = max(len(sequence.ids) for sequence in sequences) - max_tokens
    return _cut(first[:shared], excess, bos, on_long), [sequence[shared:] for sequence in sequences]


def _cut(prompt: np.ndarray, excess: int, bos: int | None, on_long: str) -> np.ndarray:
    """The prompt less `excess` tokens, taken from the left behind BOS; at least one other token stays."""
    if excess <= 0:
        return prompt
    first = int(len(prompt) > 0 and prompt[0] == bos)
    if on_long == "drop" or excess >= len(prompt) - first:
        raise ExampleFault("too_long", f"{excess} tokens longer than data.max_tokens")
    return np.concatenate([prompt[:first], prompt[first + excess :]])
