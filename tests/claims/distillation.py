"""Distillation on the embedded world: the base learns to answer from the distribution of a model that does."""

import time

import jaxpost
from tests.claims.preference import world_metrics
from tests.claims.runs import SEEDS, train


def distilled() -> list[tuple]:
    """The base answers nothing; towards the SFT model's distribution over the next token it learns to answer."""
    base, teacher = (world_metrics(jaxpost.load(f"embedded:{name}"))["correct"] for name in ("base", "sft"))
    right = "held-out questions answered right"
    rows = [
        (f"base: {right}", "-", base, "at most 0.05", base <= 0.05),
        (f"teacher: {right}", "-", teacher, "reported", True),
    ]
    for seed in SEEDS:
        began = time.perf_counter()
        run = train("distill", seed)
        seconds = f"seed {seed}, {time.perf_counter() - began:.0f} s"
        correct, divergence = world_metrics(run)["correct"], run.metrics["eval/divergence"]
        shrunk = divergence[-1, 1] / divergence[0, 1]
        rows += [
            (f"distilled: {right}", seconds, correct, "at least 0.85", correct >= 0.85),
            ("held-out divergence, after / before", seconds, shrunk, "below 0.2", shrunk < 0.2),
        ]
    return rows
