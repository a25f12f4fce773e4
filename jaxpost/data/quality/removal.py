"""One example that was left out."""

import dataclasses

from jaxpost.types import Origin

REASONS = (
    *("prompt_length", "answer_length", "script", "refusal", "matches_pattern", "lacks_pattern"),
    *("contaminated", "exact_duplicate", "near_duplicate"),
)


@dataclasses.dataclass(frozen=True)
class Removal:
    """reason: one of REASONS. detail: what it rests on, JSON values by name."""

    origin: Origin
    reason: str
    detail: dict

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.detail.items())
