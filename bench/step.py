"""Times one train step of jaxpost beside Tunix and TRL: float32 on CPU, each in its own environment and process.

    bench/setup.sh                                  # once: the peers' environments
    python bench/step.py                            # all workloads, about 15 minutes on a quiet machine of 2 cores
    python bench/step.py --workloads sft --steps 20

Runs follow one another, never two at once. A time is the median over steps after the warm-up; examples (rows, pairs)
a second are over all timed steps. What the columns mean, and what was learnt: docs/performance.md.
"""

import argparse
import json
import math
import os
import pathlib

import workload
from measuring import SHARED, TOKENIZER, Run, markdown, measure

PAIRS = SHARED / "hh_rlhf" / "pairs.jsonl.gz"
TARGETS = {  # workload -> (peer, quantity, bound): what jaxpost is held to against the best run of that peer
    "sft": [("tunix", "time", 0.8)],
    "dpo_hh": [("trl", "rate", 3.0), ("tunix", "rate", 2.0)],
}


RUNS = {
    "sft": [Run("jaxpost", "4 rows of 256", ("--rows=4", "--tokens=256")), Run("tunix", ""), Run("trl", "")],
    "dpo": [
        Run("jaxpost", "cached reference", ("--rows=4", "--tokens=384")),
        Run("jaxpost", "live reference", ("--rows=4", "--tokens=384", "--reference=live")),
        Run("tunix", "live reference"),
        Run("trl", "cached reference", ("--reference=cached",)),
        Run("trl", "live reference"),
    ],
    "dpo_hh": [
        Run("jaxpost", "cached, 2 packed rows of 896", ("--rows=2", "--tokens=896")),
        Run("tunix", "live, padded to 256 + 256"),
        Run("trl", "cached, padded to the longest", ("--reference=cached",)),
        Run("trl", "cached, grouped by length", ("--reference=cached", "--order=by_length")),
        Run("trl", "live, padded to the longest"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=pathlib.Path, default=pathlib.Path(os.environ.get("BENCH_ENVS", ".bench")))
    parser.add_argument("--workloads", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--peers", nargs="+", choices=["jaxpost", "tunix", "trl"], default=["jaxpost", "tunix", "trl"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of every run, at least 5")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (compilation, allocation)")
    parser.add_argument("--seed", type=int, default=0, help="of the random ids and of the sample of dialogues")
    parser.add_argument("--pairs", type=pathlib.Path, default=PAIRS, help="dialogues of dpo_hh, .jsonl.gz")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=TOKENIZER, help="sentencepiece model of dpo_hh")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all that was measured")
    options = parser.parse_args()
    if options.steps < 5 or options.warmup < 1:
        parser.error("--steps: at least 5 make a median; --warmup: at least 1")
    results = {}
    for name in options.workloads:
        work = make_workload(name, options)
        if work is not None:
            runs = [run for run in RUNS[name] if run.peer in options.peers]
            results[name] = measure("step", work, runs, options.envs)
            print(table(name, results[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def make_workload(name: str, options) -> dict | None:
    steps = (options.warmup, options.steps, options.seed)
    if name != "dpo_hh":
        return getattr(workload, name)(*steps)
    missing = [str(path) for path in (options.pairs, options.tokenizer) if not path.exists()]
    if missing:
        print(f"dpo_hh: left out, {' and '.join(missing)} not found; name them with --pairs and --tokenizer")
        return None
    return workload.dpo_hh(*steps, options.pairs, options.tokenizer)


def table(name: str, rows: list[dict]) -> str:
    """A Markdown table; ratios are to the first row that was measured, which is jaxpost's."""
    unit = "rows" if name == "sft" else "pairs"
    head = ["", "s/step", f"{unit}/s", "ratio", f"{unit}/s, first epoch", "first loss", "peak RSS", "ratio"]
    lines = []
    base = next((row for row in rows if "error" not in row), None)
    for row in rows:
        title = f"{row.get('peer', '')} {row['label']}".strip()
        if "error" in row:
            lines.append([title, row["error"]])
            continue
        rate, rss = row["examples_per_second"], row["peak_rss_mb"]
        ratios = f"{rate / base['examples_per_second']:.2f}", f"{rss / base['peak_rss_mb']:.2f}"
        cells = [f"{row['seconds_per_step']:.3f}", f"{rate:.2f}", ratios[0], f"{first_epoch(row):.2f}"]
        cells += [f"{row['first_loss']:.4f}", f"{rss:.0f} MB", ratios[1]]
        lines.append([title, *cells])
    return "\n".join([markdown(name, head, lines), *verdicts(name, rows)])


def first_epoch(row: dict) -> float:
    """Examples a second when the pass that caches the reference is counted too; later epochs do without it."""
    cache = row["reference_examples_per_second"]
    return 1 / (1 / row["examples_per_second"] + (1 / cache if cache else 0))


def verdicts(name: str, rows: list[dict]) -> list[str]:
    """The best run of jaxpost against the best of each peer, by examples a second."""

    def best(peer: str) -> float:
        rates = [r["examples_per_second"] for r in rows if "error" not in r and r["peer"].startswith(peer)]
        return max(rates, default=math.nan)

    lines = []
    for peer, quantity, bound in TARGETS.get(name, []):
        faster = best("jaxpost") / best(peer)
        if math.isnan(faster):
            continue
        value, met = (faster, faster >= bound) if quantity == "rate" else (1 / faster, 1 / faster <= bound)
        wanted = f"at least {bound}" if quantity == "rate" else f"at most {bound}"
        lines.append(f"{name}: {quantity} {value:.2f} x {peer}'s best ({wanted}): {'met' if met else 'MISSED'}")
    return lines


if __name__ == "__main__":
    main()
