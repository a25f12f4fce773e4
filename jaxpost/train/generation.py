"""Completions for a file of prompts, in a file that is gone on with where it was left."""

import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxpost.data.formats import Example
from jaxpost.errors import DataError
from jaxpost.sampling.engine import Engine, Sampling, visible_text
from jaxpost.sampling.local import roomy
from jaxpost.train.folder import write_atomically
from jaxpost.train.prompts import Asked
from jaxpost.train.run import LoadedModel
from jaxpost.train.scoring import Answer, Scorer, refuse_failures
from jaxpost.types import Completion

log = logging.getLogger("jaxpost")


def context_of(model: LoadedModel, asked: Sequence[Asked], settings: Sampling) -> int:
    """Tokens of the longest prompt and completion, rounded up; of all, so that one program draws what a stop leaves."""
    longest = max(len(one.tokens) for one in asked) + settings.max_new_tokens
    return min(roomy(longest), model.model.policy.config.max_positions)


class Output:
    """JSON lines at `path`, one a prompt; `path`.settings.json says what they are made with.

    done: indices of the prompts whose lines are there; a last line that was half written is cut off. Raises DataError
    for a file that was made with other settings, or by something else.
    """

    def __init__(self, path, settings: dict):
        self.path = pathlib.Path(path)
        beside = pathlib.Path(f"{path}.settings.json")
        settings = json.loads(json.dumps(settings))  # as it will be read again
        if beside.exists():
            before = json.loads(beside.read_text())
            for name in [*settings, *(before.keys() - settings)]:
                if before.get(name) != settings.get(name):
                    was, now = (json.dumps(values.get(name)) for values in (before, settings))
                    raise DataError(f"{self.path}: was begun with {name} = {was}, not {now}; give another --to")
        elif self.path.exists():
            raise DataError(f"{self.path}: exists, and no {beside.name} says what it is; give another --to")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(beside, json.dumps(settings, indent=2) + "\n")
        self.done = self._go_on()

    def write(self, line: dict) -> None:
        """Appends a line; it is there whole whatever ends the process next."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add(line["index"])

    def sort(self) -> None:
        """Puts the lines in the order of the prompts; until then they stand as they were finished."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        lines.sort(key=lambda line: json.loads(line)["index"])
        write_atomically(self.path, b"".join(lines).decode())

    def _go_on(self) -> set[int]:
        content = self.path.read_bytes() if self.path.exists() else b""
        lines, done, kept = content.splitlines(keepends=True), set(), 0
        for number, line in enumerate(lines, start=1):
            try:
                index = json.loads(line)["index"]
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise DataError(
                        f"{self.path}:{number}: not a line that generate wrote; mend it, or delete it"
                    ) from None
                break
            if not line.endswith(b"\n"):
                break
            done.add(index)
            kept += len(line)
        if kept < len(content):
            log.info("%s: the last line was half written; it is made again", self.path)
            os.truncate(self.path, kept)
        return done


def generate(
    model: LoadedModel,
    engine: Engine,
    asked: Sequence[Asked],
    output: Output,
    *,
    settings: Sampling,
    seed: int,
    completions: int = 1,
    keep: int | None = None,
    score: Scorer | None = None,
    token_ids: bool = False,
) -> Iterator[int]:
    """Draws completions for the prompts that `output` has not, writes a line for each, and yields its index.

    What is drawn for a prompt depends on `seed` and its index alone, so a file that was gone on with is the same.

    keep: how many of the completions are written, best first by `score`; None: all, as they were drawn.
    """
    rest = [index for index in range(len(asked)) if index not in output.done]
    if not rest:
        return
    prompts = [asked[index].tokens for index in rest]
    kwargs = {"settings": settings, "completions": completions, "indices": rest}
    for place, drawn in engine.stream(model.params, prompts, jax.random.key(seed), **kwargs):
        one = asked[rest[place]]
        texts = [visible_text(completion, model.model.tokenizer, settings) for completion in drawn]
        found = [_described(completion, text, token_ids) for completion, text in zip(drawn, texts, strict=True)]
        if score is not None:
            scored = score([Answer(one, completion, text) for completion, text in zip(drawn, texts, strict=True)])
            refuse_failures(scored)
            found = [made | {"score": value} for made, value in zip(found, scored.values.tolist(), strict=True)]
        if keep is not None:
            found = sorted(found, key=lambda made: -made["score"])[:keep]
        output.write({"index": rest[place], **_prompt(one.example), "completions": found})
        yield rest[place]
    output.sort()


def _described(completion: Completion, text: str, token_ids: bool) -> dict:
    logp = float(np.asarray(completion.logps, np.float64).sum())
    made = {
        "text": text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.tokens),
        "logp": logp if math.isfinite(logp) else None,  # a server may not tell
    }
    return made | ({"token_ids": completion.tokens.tolist()} if token_ids else {})


def _prompt(example: Example) -> dict:
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt}
    tools = {"tools": list(example.prompt.tools)} if example.prompt.tools else {}
    return {"messages": list(example.prompt.messages), **tools}
