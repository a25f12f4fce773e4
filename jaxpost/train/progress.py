"""What a run shows while it trains: a table at the start, a progress bar, completions before and after."""

import time
from collections.abc import Iterable, Sequence

import jax
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

LINE_SECONDS = 10.0  # without a terminal: one line this often
SMOOTHING = 0.9  # of tokens/s shown, per step


class Progress:
    """A bar with loss, tokens/s and time left; lines now and then where the output is not a terminal.

    total_steps: updates of the whole run; start_step: those done before (a resumed run).
    Only the first host shows anything. Use as a context manager.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None):
        self._console = console or Console()
        self._total = total_steps
        self._active = jax.process_index() == 0
        self._speed: float | None = None
        self._started = time.monotonic(), start_step
        self._next_line = 0.0
        self._bar = None
        if self._active and self._console.is_terminal:
            columns = "training", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
            self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step, note="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, value: float, tokens_per_second: float, name: str = "loss") -> None:
        """`step` steps are done; a value of the last one, by its name, and its tokens (without padding) per second."""
        if not self._active:
            return
        old = self._speed
        self._speed = tokens_per_second if old is None else SMOOTHING * old + (1 - SMOOTHING) * tokens_per_second
        note = f"{name} {value:.4f}  {self._speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif time.monotonic() >= self._next_line or step == self._total:
            self._next_line = time.monotonic() + LINE_SECONDS
            self.print(f"step {step}/{self._total}  {note}  {self._time_left(step)} left")

    def print(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        began, start_step = self._started
        seconds = (time.monotonic() - began) / max(1, step - start_step) * (self._total - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def track(steps: Sequence, title: str, console: Console | None = None) -> Iterable:
    """The steps one after another, with a bar that is gone at the end (none where the output is not a terminal)."""
    console = console or Console()
    hidden = jax.process_index() != 0 or not console.is_terminal
    return rich.progress.track(steps, title, console=console, transient=True, disable=hidden)


def print_table(title: str, rows: Sequence[tuple[str, object]], console: Console | None = None) -> None:
    """Name and value in two columns; whole numbers get thousands separators."""
    table = Table(title=_plain(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, _plain(f"{value:,}" if type(value) is int else str(value)))
    _show(table, console)


def print_before_after(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str], console: Console | None = None
) -> None:
    """Each evaluation prompt with the model's completion before and after training, side by side."""
    table = Table(title="Before and after", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for texts in zip(prompts, before, after, strict=True):
        table.add_row(*(_plain(text) for text in texts))
    _show(table, console)


def _plain(text: str):
    from rich.text import Text  # not markup: a path or a completion may well contain [brackets]

    return Text(text)


def _show(table: Table, console: Console | None) -> None:
    if jax.process_index() == 0:
        (console or Console()).print(table)
