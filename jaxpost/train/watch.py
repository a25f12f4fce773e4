"""Rules that warn or stop when a run goes wrong, above all when it games its reward: `halt_when`, `warn_when`.

A rule is one line about metrics, by the names under which they are logged:

    kl > 0.5                                    at one step
    reward_std < 1e-6 for 5                     at 5 steps in a row
    length > 2x start                           twice the mean of its first 3 steps
    gold falls while reward rises over 20       over the last 20 steps that log both

A value that is not finite is beyond any bound, and no part of a trend. A trend is one by the test of Mann (1945) and
Kendall: so many more pairs of the window fall than rise that noise alone does it in about 1 of 1000 windows. It asks
for an order, not for a straight line, and no single odd step decides it.
"""

import collections
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from jaxpost.errors import ConfigError, UserError

START_ROWS = 3  # whose mean is the start of a metric
FEWEST_ROWS = 7  # of a trend: fewer can show none, even in perfect order
SIGNIFICANT = 3.0  # standard deviations of Kendall's S

METRIC = r"([A-Za-z_][\w./:-]*)"
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
BOUND = re.compile(rf"{METRIC} ?([<>]) ?{NUMBER}(x start)?(?: for (\d+))?")
TREND = re.compile(rf"{METRIC} (falls|rises)(?: while {METRIC} (falls|rises))? over (\d+)")
EXAMPLES = "'kl > 0.5', 'reward_std < 1e-6 for 5', 'length > 2x start', 'gold falls while reward rises over 20'"

History = Sequence[tuple[int, tuple[float, ...]]]  # (step, value of each metric) of the newest rows, oldest first


@dataclasses.dataclass(frozen=True)
class Bound:
    """A metric is above or below `limit`, or `limit` times its start, `rows` steps in a row."""

    metrics: tuple[str]
    above: bool
    limit: float
    of_start: bool = False
    rows: int = 1

    def reads(self, values: Sequence[float]) -> bool:
        return True

    def seen(self, history: History, first: Sequence[float]) -> str:
        """What there is to see where the rule holds, else "". first: the metric's first values."""
        (name,), limit, times = self.metrics, self.limit, ""
        if self.of_start:
            if len(first) < START_ROWS:
                return ""
            start = float(np.mean(first))
            if not start > 0:
                raise UserError(f"{name} started at {start:.4g}, and {limit:g}x of that is no bound; set a number")
            limit, times = limit * start, f" ({limit:g}x its start)"
        newest = [values[0] for _, values in history][-self.rows :]
        beyond = [not math.isfinite(x) or (x > limit if self.above else x < limit) for x in newest]
        if len(newest) < self.rows or not all(beyond):
            return ""
        side, long = "above" if self.above else "below", f" for {self.rows} steps" if self.rows > 1 else ""
        return f"{name} is {newest[-1]:.4g}, {side} {limit:.4g}{times}{long}"

    def good(self, history: History) -> int:
        return history[-self.rows - 1][0] if len(history) > self.rows else 0


@dataclasses.dataclass(frozen=True)
class Trend:
    """Each of `metrics` rises (True) or falls over the last `rows` steps that log all of them."""

    metrics: tuple[str, ...]
    rises: tuple[bool, ...]
    rows: int

    def reads(self, values: Sequence[float]) -> bool:
        return all(map(math.isfinite, values))

    def seen(self, history: History, first: Sequence[float]) -> str:
        window = list(history)[-self.rows :]
        if len(window) < self.rows:
            return ""
        moves = []
        for name, rises, values in zip(self.metrics, self.rises, np.array([v for _, v in window]).T, strict=True):
            if kendall(values) * (1 if rises else -1) < SIGNIFICANT:
                return ""
            before, after = (half.mean() for half in np.array_split(values, 2))
            moves.append(f"{name} {'rose' if rises else 'fell'} from {before:.4g} to {after:.4g}")
        return f"{' while '.join(moves)} (means of the halves of steps {window[0][0]} to {window[-1][0]})"

    def good(self, history: History) -> int:
        return history[-self.rows][0]


def kendall(values: Sequence[float]) -> float:
    """Rising less falling pairs of a series, in the standard deviations that order without trend would have."""
    count, values = len(values), np.asarray(values, np.float64)
    earlier, later = np.triu_indices(count, 1)
    return float(np.sign(values[later] - values[earlier]).sum() / math.sqrt(count * (count - 1) * (2 * count + 5) / 18))


def parse(text: str, key: str) -> Bound | Trend:
    """The rule of one line. Raises ConfigError that begins with `key`."""
    if match := BOUND.fullmatch(text):
        metric, side, limit, of_start, rows = match.groups()
        rule = Bound((metric,), side == ">", float(limit), bool(of_start), int(rows or 1))
        if rule.rows < 1:
            raise ConfigError(f"{key}: {text!r}: for {rule.rows} is out of range; expected at least 1 step")
        if rule.of_start and rule.limit <= 0:
            raise ConfigError(f"{key}: {text!r}: {limit} is out of range; expected a factor above 0")
        return rule
    if match := TREND.fullmatch(text):
        *moves, rows = match.groups()
        metrics, words = (tuple(word for word in part if word) for part in (moves[::2], moves[1::2]))
        if int(rows) < FEWEST_ROWS:
            raise ConfigError(f"{key}: {text!r}: over {rows} is too short; a trend needs at least {FEWEST_ROWS} steps")
        if len(set(metrics)) < len(metrics):
            raise ConfigError(f"{key}: {text!r}: expected two metrics, got {metrics[0]} twice")
        return Trend(metrics, tuple(word == "rises" for word in words), int(rows))
    raise ConfigError(f"{key}: {text!r} is no rule; expected one like {EXAMPLES}")


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A rule that has come to hold at `step`. good: the last step at which all was well; 0 where there was none."""

    rule: str
    step: int
    message: str  # what there was to see
    action: Literal["warn", "halt"]
    good: int

    def __str__(self) -> str:
        return f"step {self.step}, {self.action}_when '{self.rule}': {self.message}"


class _Judge:
    """One rule, and what must be remembered of the rows so far."""

    def __init__(self, text: str, action: str, known: Collection[str] | None):
        self.text, self.action, self.key = " ".join(text.split()), action, f"{action}_when"
        self.rule = parse(self.text, self.key)
        self._history = collections.deque(maxlen=self.rule.rows + 1)
        self._first, self._held = [], False
        for metric in self.rule.metrics if known is not None else ():
            if metric not in known:
                near = difflib.get_close_matches(metric, known, 3, cutoff=0.3) or sorted(known)
                raise ConfigError(
                    f"{self.key}: {self.text!r}: {metric} is not logged by this run; there are {', '.join(near)}"
                )

    def see(self, step: int, values: tuple[float, ...]) -> Alarm | None:
        """The alarm, where the rule holds with this row and did not before."""
        if not self.rule.reads(values):
            return None
        self._history.append((step, values))
        if len(self._first) < START_ROWS and math.isfinite(values[0]):
            self._first.append(values[0])
        try:
            message = self.rule.seen(self._history, self._first)
        except UserError as error:
            raise UserError(f"{self.key}: {self.text!r}: {error}") from None
        began, self._held = bool(message) and not self._held, bool(message)
        return Alarm(self.text, step, message, self.action, self.rule.good(self._history)) if began else None


class Watch:
    """Holds the rows of a run against rules, one after another. A resumed run first gives it the rows that there are.

    Args:
      halt_when, warn_when: rules, as in the module's docstring. known: names of all metrics that the run may log; None:
        any, and what is never logged is never judged.

    Raises:
      ConfigError: what is no rule, or is about a metric that is not known.
    """

    def __init__(self, halt_when: Iterable[str], warn_when: Iterable[str] = (), known: Collection[str] | None = None):
        rules = [("halt", text) for text in halt_when] + [("warn", text) for text in warn_when]
        self._judges = [_Judge(text, action, known) for action, text in rules]
        self._row = {}

    def check(self, row: Mapping[str, float]) -> list[Alarm]:
        """Alarms of the rules that hold at this row of metrics.jsonl and did not before.

        Rows of one step (of training, of an evaluation) count as one. Raises UserError where a rule bounds a metric by
        a multiple of a start that is not above 0.
        """
        self._row = {**(self._row if self._row.get("step") == row["step"] else {}), **row}
        alarms = []
        for judge in self._judges:
            metrics = judge.rule.metrics
            if not row.keys().isdisjoint(metrics) and all(name in self._row for name in metrics):
                alarms.append(judge.see(row["step"], tuple(float(self._row[name]) for name in metrics)))
        return [alarm for alarm in alarms if alarm]


def last_good(saved: Iterable[int], alarms: Sequence[Alarm]) -> int | None:
    """The newest of the steps at which checkpoints were saved that is from before the trouble; None: there is none.

    The row of step s is about what the policy said that s - 1 updates had made.
    """
    good = min(alarm.good for alarm in alarms)
    return max((step for step in saved if step < good), default=None)
