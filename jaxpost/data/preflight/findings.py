"""What preflight refuses, by name; and what becomes of it: an error, or a warning where it is allowed."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence

from jaxpost.data.report import Report
from jaxpost.errors import DataError
from jaxpost.types import Origin

REFUSALS = {
    "two_bos": "two BOS tokens side by side: the template writes one and so does something else",
    "no_end_trained": "no end-of-turn token among the last trained ones: the model never learns to stop",
    "end_does_not_stop": "a turn ends with a special token at which generation does not stop",
    "empty_mask": "no token of a completion is trained",
    "seen_trained": "a token of a user's, a system's or a tool's words is trained",
    "header_trained": "a token behind the end of a turn is trained, such as the header of the next",
    "completion_lost": "a completion, or a part of it, does not fit in data.max_tokens or is left out by the template",
    "not_shown": "the tools offered, or what the assistant thinks, are left out by the template",
    "pad_inside": "a padding token inside a document",
    "chosen_equals_rejected": "chosen and rejected have the same tokens",
    "beyond_vocabulary": "a token that the model has no embedding for",
    "prompt_not_prefix": "what the model is given in use is not the beginning of what it is trained on",
    "too_many_dropped": "a larger share of the examples is dropped than data.max_dropped",
}

NOT_CHECKED = "not_checked"  # what could not be looked at is always told, and never refused
NEVER_ALLOWED = "beyond_vocabulary"  # data.allow cannot name it: no model can be trained in spite of it


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with one document: a name of REFUSALS or NOT_CHECKED, one line for the user, where it came from."""

    reason: str
    detail: str
    origin: Origin

    def __str__(self) -> str:
        return f"{self.origin}: {self.detail} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A refusal: how many of how many it concerns, and the first of them."""

    reason: str
    count: int
    looked_at: int
    of: str  # what was looked at: "documents", "examples"
    first: Problem

    def __str__(self) -> str:
        share = f"{self.count:,} of {self.looked_at:,} {self.of}"
        return f"{self.reason}: {share}; first {self.first.origin}: {self.first.detail}"


def group(problems: Iterable[Problem], looked_at: int, of: str) -> list[Finding]:
    """Problems by reason, in the order of REFUSALS."""
    order = [*REFUSALS, NOT_CHECKED]
    found = sorted(problems, key=lambda problem: order.index(problem.reason))
    groups = [(reason, list(members)) for reason, members in itertools.groupby(found, lambda p: p.reason)]
    return [Finding(reason, len(members), looked_at, of, members[0]) for reason, members in groups]


def drops(report: Report, max_dropped: float, on_long: str) -> list[Finding]:
    """What the reading dropped and should not pass without a word: three reasons at once, the others by their share."""
    names = {"empty_mask": "empty_mask", "chosen_equals_rejected": "chosen_equals_rejected"}
    if on_long == "truncate":  # what is dropped as too long is what cutting the prompt could not save
        names["too_long"] = "completion_lost"
    found = []
    for reason, name in names.items():
        if count := report.dropped[reason]:
            fault = report.origins[reason][0]
            found.append(Finding(name, count, report.read, "examples", Problem(name, fault.detail, fault.origin)))
    dropped = report.dropped.total()
    if dropped > max_dropped * report.read:
        fault = report.origins[report.dropped.most_common(1)[0][0]][0]
        reasons = ", ".join(f"{reason} {n:,} ({_places(report, reason)})" for reason, n in report.dropped.most_common())
        detail = f"{fault.detail}; dropped are {reasons}; data.max_dropped is {max_dropped:g}"
        problem = Problem("too_many_dropped", detail, fault.origin)
        found.append(Finding("too_many_dropped", dropped, report.read, "examples", problem))
    return found


def _places(report: Report, reason: str) -> str:
    faults = report.origins[reason]
    places = ", ".join(str(fault.origin).rpartition("/")[2] for fault in faults)
    return places + ", ..." * (report.dropped[reason] > len(faults))


def refuse(findings: Sequence[Finding], allow: Collection[str]) -> list[Finding]:
    """Raises DataError with all refusals that `allow` does not name; returns the others, which are warnings."""
    refused = [finding for finding in findings if finding.reason not in (*allow, NOT_CHECKED)]
    if refused:
        names = ", ".join(dict.fromkeys(finding.reason for finding in refused if finding.reason != NEVER_ALLOWED))
        hint = f" (a warning where data.allow names {names})" if names else ""
        raise DataError("; ".join(map(str, refused)) + hint)
    return list(findings)
