"""The log of a run: one JSON object a line in RUN_DIR/metrics.jsonl, and writers that follow it.

A row has `step` (1 = the first update) and numbers; names are TRL's where it logs the same quantity
(`rewards/chosen`, `mean_token_accuracy`, `entropy`, `num_tokens`). Evaluations are rows of their own, every
name but `step` with the prefix `eval/`.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from typing import Protocol

import jax
from etils import epath

from jaxpost.errors import ConfigError, DataError

REMOTE_SECONDS = 30  # object stores cannot append: there the whole file is written anew, at most this often


class Writer(Protocol):
    """Something that rows are also sent to."""

    def write(self, row: dict) -> None:
        """row: `step`, and Python numbers; values that are not finite are float nan or inf."""

    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl under `run_dir` (local or gs://), flushed at every row; only the first host writes.

    Numbers keep all their digits. NaN and infinities, which JSON does not have, are written as null and read
    back as NaN.
    """

    def __init__(self, run_dir, writers: Sequence[Writer] = ()):
        self.path = epath.Path(run_dir) / "metrics.jsonl"
        self._writers = tuple(writers)
        self._active = jax.process_index() == 0
        self._file = None
        if self._active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_log(self.path)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, row: dict) -> dict:
        """Adds a row. Values are numbers or scalar arrays; the row is returned as Python numbers."""
        row = {name: _number(value) for name, value in row.items()}
        if self._active:
            self._file.append(_encode(row))
            for writer in self._writers:
                writer.write(row)
        return row

    def cut(self, step: int) -> None:
        """Removes the rows after `step`, as a run does that goes on from there. The file is replaced as a whole."""
        if self._active:
            self._file.replace([_encode(row) for row in self.read() if row["step"] <= step])

    def read(self) -> list[dict]:
        """All rows so far. A last line that an interrupted run left unfinished is not one."""
        if self._file is not None:
            self._file.flush()
        return read_rows(self.path)

    def close(self) -> None:
        if self._active:
            self._file.close()
            for writer in self._writers:
                writer.close()


def read_rows(path) -> list[dict]:
    """Rows of a metrics.jsonl; null becomes NaN. DataError naming the line that is not JSON."""
    path = epath.Path(path)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error})") from None
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def open_writers(names: Sequence[str], run_dir, config: dict) -> list[Writer]:
    """The writers called "tensorboard" and "wandb". ConfigError naming the extra where wandb is not installed."""
    known = {"tensorboard": lambda: TensorBoardWriter(run_dir), "wandb": lambda: WandbWriter(run_dir, config)}
    return [known[name]() for name in names] if jax.process_index() == 0 else []


class TensorBoardWriter:
    """TensorBoard files under RUN_DIR/tensorboard, by tensorboardX."""

    def __init__(self, run_dir):
        import tensorboardX  # takes a second, and not every run wants it

        self._open = tensorboardX.SummaryWriter
        self._dir = os.fspath(epath.Path(run_dir) / "tensorboard")
        self._writer = None

    def write(self, row: dict) -> None:
        step = row["step"]
        if self._writer is None:  # not before: a resumed run hides the rows from its first new step on
            # The suffix: files are named by the second, and one of the same name would be written over.
            self._writer = self._open(self._dir, purge_step=step, filename_suffix=f".{step}")
        for name, value in row.items():
            if name != "step" and math.isfinite(value):  # else tensorboardX warns, and nothing could be drawn
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbWriter:
    """Weights & Biases: a run named after the folder, and continued when the folder's run is resumed."""

    def __init__(self, run_dir, config: dict):
        try:
            import wandb
        except ImportError:
            raise ConfigError("run.log_to: 'wandb' needs the package wandb; pip install 'jaxpost[log]'") from None
        name = epath.Path(run_dir).name
        self._run = wandb.init(project="jaxpost", name=name, id=name, resume="allow", config=config)

    def write(self, row: dict) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _number(value):
    """A Python int or float of the same value."""
    return value.item() if hasattr(value, "item") else value


def _encode(row: dict) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


def _open_log(path: epath.Path):
    return _RemoteLog(path) if "://" in os.fspath(path) else _LocalLog(path)


class _LocalLog:
    """Lines appended to a file, each handed to the system at once, so that a killed process loses none."""

    def __init__(self, path):
        self._path = path
        text = path.read_text() if path.exists() else ""
        if not text.endswith("\n") and text:
            self._write_all(text[: text.rfind("\n") + 1])  # an interrupted write: the next line must not join it
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def replace(self, lines: list[str]) -> None:
        self._file.close()
        self._write_all("".join(line + "\n" for line in lines))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _write_all(self, text: str) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._path)


class _RemoteLog:
    """The same where files can only be written whole, as in gs://."""

    def __init__(self, path, seconds: float = REMOTE_SECONDS):
        self._path, self._seconds = path, seconds
        text = path.read_text() if path.exists() else ""
        self._lines = text.split("\n")[:-1]
        self._written = time.monotonic()

    def append(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() - self._written > self._seconds:
            self.flush()

    def replace(self, lines: list[str]) -> None:
        self._lines = list(lines)
        self.flush()

    def flush(self) -> None:
        self._path.write_text("".join(line + "\n" for line in self._lines))
        self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
