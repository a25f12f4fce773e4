"""What a run drew, a file a step in RUN_DIR/rollouts: to be read by people, and replayed by a run that goes on.

Line 1 says what decides the draws, every further line is one prompt with its completions, as they were finished, and
the last one holds their scores. A resumed run takes from it what is there and draws the rest. Of several hosts all read
and the first one writes.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxpost.train import hosts
from jaxpost.types import Completion

log = logging.getLogger("jaxpost")

ARRAYS = {"tokens": np.int32, "logps": np.float32, "drawn_logps": np.float32}


class Journal:
    """The files of one run."""

    def __init__(self, folder: epath.Path):
        self.folder = folder

    def path(self, step: int) -> epath.Path:
        return self.folder / f"step-{step:06d}.jsonl"

    def begin(self, step: int, head: dict[str, Any]) -> tuple[dict[int, tuple[Completion, ...]], dict | None]:
        """({place: completions of the step's prompt at this place}, scores or None) that were journaled for it.

        head: what decides the draws, as JSON. A file of other draws is begun anew, a half-written last line cut.
        """
        path, head = self.path(step), json.loads(json.dumps(head))
        lines = _whole_lines(path)
        if len(set(hosts.gathered(_digest(lines)))) > 1:
            log.warning("%s: not the same on all hosts, and is made again", path)
            lines = []
        if not lines or lines[0] != head:
            if lines:
                log.warning("%s: is of other draws than this run's, and is made again", path)
            lines = [head]
        if hosts.first():  # all have read it
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        found = {line["place"]: tuple(map(_read, line["completions"])) for line in lines[1:] if "place" in line}
        return found, next((line["scores"] for line in lines[1:] if "scores" in line), None)

    def add(self, step: int, place: int, prompt: str, completions: Sequence[Completion], texts: Sequence[str]) -> None:
        """The completions of one prompt."""
        written = [_written(completion, text) for completion, text in zip(completions, texts, strict=True)]
        self._append(step, {"place": place, "prompt": prompt, "completions": written})

    def finish(self, step: int, scores: dict[str, Any]) -> None:
        """The scores of all completions; with them the step need not be drawn or scored again."""
        self._append(step, {"scores": scores})

    def prune(self, first: int) -> None:
        """Deletes the files of steps before `first`."""
        for path in self.folder.glob("step-*.jsonl") if hosts.first() else ():
            if int(path.stem.partition("-")[2]) < first:
                path.unlink()

    def _append(self, step, line):
        if not hosts.first():
            return
        with self.path(step).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _digest(lines: list[dict]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _whole_lines(path) -> list[dict]:
    lines = []
    for text in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # the process ended here
    return lines


def _written(completion: Completion, text: str) -> dict:
    """Readable, but for the numbers, whose bits must come back."""
    arrays = {name: getattr(completion, name).astype(kind) for name, kind in ARRAYS.items()}
    coded = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
    return {"text": text, "finish_reason": completion.finish_reason, **coded}


def _read(line: dict) -> Completion:
    arrays = {name: np.frombuffer(base64.b64decode(line[name]), kind) for name, kind in ARRAYS.items()}
    return Completion(finish_reason=line["finish_reason"], **arrays)
