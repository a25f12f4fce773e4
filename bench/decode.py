"""New tokens a second of jaxpost's engine beside Tunix's sampler and transformers: float32 on CPU, random weights.

    bench/setup.sh                                     # once: the peers' environments
    python bench/decode.py                             # all, about an hour on a quiet machine of 2 cores
    python bench/decode.py --workloads equal --rows 32 --temperatures 1

Runs follow one another, never two at once. Every engine makes completions of the same lengths for the same prompts; how
each is held to them, and what was learnt: docs/performance.md.
"""

import argparse
import json
import math
import os
import pathlib
import statistics

import workload
from measuring import SHARED, TOKENIZER, Run, markdown, measure

QUESTIONS = SHARED / "gsm8k" / "train.jsonl"
TARGETS = {"equal": 1.5, "gsm8k": 3.0}  # new tokens a second beside the best run of Tunix, at temperature 1
PEERS = {"jaxpost": (16, 32, 64), "tunix": (16, 32, 64, 128), "trl": (32, 64)}  # and the rows that they are tried with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=pathlib.Path, default=pathlib.Path(os.environ.get("BENCH_ENVS", ".bench")))
    parser.add_argument("--workloads", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.0], help="0: greedy")
    parser.add_argument("--rows", nargs="+", type=int, help="completions that decode at once, in place of each peer's")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of every run, after one that compiles")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the lengths")
    parser.add_argument("--questions", type=pathlib.Path, default=QUESTIONS, help="of gsm8k, .jsonl")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=TOKENIZER, help="sentencepiece model of gsm8k")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all that was measured")
    options = parser.parse_args()
    results = {}
    for name in options.workloads:
        size = (options.prompts, options.completions, options.seed)
        files = (options.questions, options.tokenizer) if name == "gsm8k" else ()
        if missing := [str(path) for path in files if not path.exists()]:
            parser.error(f"gsm8k: {' and '.join(missing)} not found; name them with --questions and --tokenizer")
        work = getattr(workload, name)(*size, *files)
        for temperature in options.temperatures:
            title = f"{name}, {'temperature ' + format(temperature, 'g') if temperature else 'greedy'}"
            results[title] = measure("decode", work, runs(options, temperature), options.envs)
            print(table(title, results[title]) + verdict(title, results[title], TARGETS[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def runs(options, temperature: float) -> list[Run]:
    return [
        Run(peer, f"{rows} rows", (f"--rows={rows}", f"--temperature={temperature}", f"--repeats={options.repeats}"))
        for peer in options.peers
        for rows in options.rows or PEERS[peer]
    ]


def rate(row: dict, seconds: str = "seconds") -> float:
    """New tokens a second of the median pass."""
    return row["new_tokens"] / statistics.median(row[seconds])


def table(title: str, rows: list[dict]) -> str:
    lines = []
    for row in rows:
        name = f"{row['peer']}, {row['label']}"
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        spread = f"{min(row['seconds']):.1f} to {max(row['seconds']):.1f}"
        cpu = 1e3 / rate(row, "cpu_seconds")
        lines.append([name, f"{rate(row):.0f}", f"{cpu:.2f}", spread, f"{row['peak_rss_mb']:.0f} MB"])
    return markdown(title, ["", "new tokens/s", "CPU ms a new token", "s a pass", "peak RSS"], lines)


def verdict(title: str, rows: list[dict], wanted: float) -> str:
    """The best run of jaxpost against the best of Tunix; nothing where one of them is missing."""

    def best(peer: str, kind: str) -> float:
        return max((rate(row, kind) for row in rows if row["peer"].startswith(peer) and "error" not in row), default=0)

    wall, cpu = (best("jaxpost", kind) / (best("tunix", kind) or math.nan) for kind in ("seconds", "cpu_seconds"))
    if not wall > 0:
        return ""
    return (
        f"\n{title}: {wall:.2f} x the new tokens/s of Tunix's best, {cpu:.2f} x by CPU time "
        f"(at least {wanted}): {'met' if wall >= wanted else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
