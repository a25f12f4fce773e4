"""What the tokens of a document tell by themselves."""

import numpy as np

from jaxpost.data.documents import Documents, LazyDocuments
from jaxpost.data.preflight.findings import REFUSALS, Problem
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.types import Document

END_TOKENS = 4  # an end-of-turn token stands among the last so many trained ones (a newline may follow it)


def check_documents(
    documents: Documents | LazyDocuments, tokenizer: Tokenizer, vocab_size: int, most: int | None = None
) -> tuple[int, list[Problem]]:
    """(documents looked at, their problems): all of them, or `most` at even distances.

    Raw text is exempt from ending with an end-of-turn token: a piece of it may end anywhere.
    """
    if tokenizer.vocab_size > vocab_size:  # else no token can be beyond; here a sample would be no proof
        most = None
    rules, problems, count = _Rules(tokenizer, vocab_size), [], 0
    for document in documents if most is None else documents.sample(most):
        problems += rules.check(document)
        count += 1
    return count, problems


class _Rules:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size, self._stops = tokenizer, vocab_size, set(tokenizer.stop_ids)
        unknown = tokenizer.token_id(tokenizer.special_tokens.get("unk_token", ""))
        # Many tokenizers have no padding token of their own and name EOS, BOS or UNK, which may well occur.
        self._pad = tokenizer.pad_id
        if self._pad in (*self._stops, tokenizer.bos_id, unknown):
            self._pad = None

    def check(self, document: Document) -> list[Problem]:
        found = {} if document.completions else self._check_ids(document.prompt)
        for completion, weights in zip(document.completions, document.weights, strict=True):
            found |= self._check_ids(np.concatenate([document.prompt, completion]))
            trained = completion[np.asarray(weights) > 0]
            if len(trained) == 0:
                found["empty_mask"] = REFUSALS["empty_mask"]
            elif not _is_raw_text(document):
                found |= self._check_end(trained[-END_TOKENS:].tolist())
        if len(document.completions) == 2 and np.array_equal(*document.completions):
            found["chosen_equals_rejected"] = REFUSALS["chosen_equals_rejected"]
        return [Problem(reason, detail, document.origin) for reason, detail in found.items()]

    def _check_ids(self, ids: np.ndarray) -> dict[str, str]:
        found, bos = {}, self._tokenizer.bos_id
        if bos is not None:
            doubled = (ids[1:] == bos) & (ids[:-1] == bos)
            # Where BOS ends turns too, two may meet between turns.
            if (doubled[:1] if bos in self._stops else doubled).any():
                found["two_bos"] = REFUSALS["two_bos"]
        if self._pad is not None and (ids == self._pad).any():
            place = int(np.argmax(ids == self._pad)) + 1
            found["pad_inside"] = f"token {place} is the padding token {self._tokenizer.token(self._pad)}"
        if ids.max() >= self._vocab_size:
            beyond = int(ids.max())
            token, size = self._tokenizer.token(beyond), self._vocab_size
            found["beyond_vocabulary"] = f"token {token!r} has the id {beyond}, but the model has {size} (from 0)"
        return found

    def _check_end(self, last: list[int]) -> dict[str, str]:
        if set(last) & self._stops:
            return {}
        show = self._tokenizer.token
        special = [show(index) for index in last if self._tokenizer.is_special(index)]
        if not special:
            return {"no_end_trained": REFUSALS["no_end_trained"]}
        stops = ", ".join(show(index) for index in self._tokenizer.stop_ids) or "nothing"
        return {"end_does_not_stop": f"a turn ends with {special[-1]}, but generation stops at {stops} only"}


def _is_raw_text(document: Document) -> bool:
    """All of it is trained: raw text, of which a piece may end anywhere."""
    return document.linear and bool(np.all(document.weights[0][1:] > 0))
