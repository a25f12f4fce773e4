"""Times what stands between a file and the first step.

    python bench/data.py open                       # a million lines of about 300 bytes: opened cold, then warm
    python bench/data.py open --lines 10000000 --packing .zst
    python bench/data.py first                      # a million conversations: until the first batch, the rate after it

"cold" makes the index (and the unpacked copy), "warm" finds them in the cache; both with the file in the page cache,
which the writing left there. Each opening is a process of its own. What was seen: docs/performance.md.
"""

import argparse
import gzip
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import zstandard

OPEN = """
import sys, time
started = time.perf_counter()
from jaxpost.data.sources import open_source
imported = time.perf_counter()
source = open_source(sys.argv[1], sys.argv[2])
opened = time.perf_counter()
record, origin = source[len(source) // 2]
print(len(source), imported - started, opened - imported, time.perf_counter() - opened)
"""


def write_lines(path: pathlib.Path, lines: int) -> None:
    """Preference pairs of about 300 bytes a line, no two alike."""
    with _open(path) as file:
        for first in range(0, lines, 10_000):
            numbers = range(first, min(first + 10_000, lines))
            file.write("".join(_line(n) for n in numbers).encode())


def _line(n: int) -> str:
    asked = f"Question {n}: how many legs have {n % 977} spiders and {n % 37} horses together, and how did you count?"
    good = f"{n % 977 * 8 + n % 37 * 4} legs: a spider has eight of them and a horse has four, so I added."
    return json.dumps({"prompt": asked, "chosen": good, "rejected": f"Hard to say. {_noise(n)}"}) + "\n"


def _noise(n: int) -> str:
    """64 letters that no packing shortens much."""
    return hashlib.sha256(str(n).encode()).hexdigest()


def _open(path: pathlib.Path):
    if path.suffix == ".zst":
        return zstandard.open(path, "wb")
    return gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb")


def run_open(arguments) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = pathlib.Path(folder) / f"lines.jsonl{arguments.packing}"
        write_lines(path, arguments.lines)
        print(f"{arguments.lines:,} lines, {path.stat().st_size / 1e6:.0f} MB on disk")
        for name in ("cold", "warm", "warm"):
            started = time.perf_counter()
            command = [sys.executable, "-c", OPEN, str(path), f"{folder}/cache"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            imported, opened, read = map(float, out[1:])
            assert int(out[0]) == arguments.lines
            whole = time.perf_counter() - started
            parts = f"open {opened:.3f} s, one record {1e3 * read:.2f} ms, import {imported:.2f} s"
            print(f"{name}: {parts}, whole process {whole:.2f} s")
        print(f"peak RSS {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3:.0f} MB")


FIRST = """
import sys, time
started = time.perf_counter()
from jaxpost import embedded
from jaxpost.data.dataset import load_dataset
from jaxpost.data.loader import Loader
from jaxpost.data.sources import open_source
from jaxpost.data.templates import load_template
from jaxpost.data.tokenizers import load_tokenizer
path, cache, tokenize, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
tokenizer = load_tokenizer(embedded.path("sft"))
template = load_template(None, tokenizer)
imported = time.perf_counter()
open_source(path, f"{cache}/sources")
opened = time.perf_counter()
data = load_dataset(path, tokenizer=tokenizer, template=template, kind="sft", max_tokens=1024, row_tokens=1024,
                    tokenize=tokenize, workers=None, cache_dir=cache)
loader = Loader(data.documents, rows_per_step=8, tokens_per_row=1024, documents_per_row=32, branches=0, seed=0)
with loader.iterate() as batches:
    batch = next(batches)
    first = time.perf_counter()
    tokens = sum(int((next(batches).rows.segments > 0).sum()) for _ in range(steps))
    last = time.perf_counter()
print(imported - started, opened - imported, first - opened, steps / (last - first), tokens / (last - first))
if tokenize == "lazy":
    data.documents.close()
"""


def write_conversations(path: pathlib.Path, lines: int) -> None:
    """Conversations of two to six turns, about 600 bytes a line, no two alike."""
    with path.open("w") as file:
        for n in range(lines):
            turns = []
            for turn in range(1 + n % 3):
                pair = json.loads(_line(n * 3 + turn))
                turns.append({"role": "user", "content": pair["prompt"]})
                turns.append({"role": "assistant", "content": pair["chosen"]})
            file.write(json.dumps({"messages": turns}) + "\n")


def run_first(arguments) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = pathlib.Path(folder) / "conversations.jsonl"
        write_conversations(path, arguments.lines)
        print(f"{arguments.lines:,} conversations, {path.stat().st_size / 1e6:.0f} MB; load {os.getloadavg()[0]:.1f}")
        for title, mode in (("lazy, cold", "lazy"), ("lazy, warm", "lazy"), ("ahead", "ahead"), ("cached", "ahead")):
            command = [sys.executable, "-c", FIRST, str(path), f"{folder}/cache", mode, str(arguments.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            imported, opened, first, steps, tokens = map(float, done.stdout.split())
            parts = f"import {imported:.2f} s, open {opened:.2f} s, then first batch {first:.2f} s"
            load = os.getloadavg()[0]
            print(f"{title}: {parts}, {steps:.1f} steps/s, {tokens:,.0f} tokens/s; load {load:.1f}", flush=True)
        print(f"peak RSS {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("open", help="seconds until a file of lines is open")
    one.add_argument("--lines", type=int, default=1_000_000)
    one.add_argument("--packing", choices=["", ".gz", ".zst"], default="")
    one.add_argument("--folder", help="where the file is written; default: the system's folder for temporary files")
    one.set_defaults(run=run_open)
    one = commands.add_parser("first", help="seconds until the first batch, and batches a second after it")
    one.add_argument("--lines", type=int, default=1_000_000)
    one.add_argument("--steps", type=int, default=600, help="batches timed after the first")
    one.add_argument("--folder", help="as above")
    one.set_defaults(run=run_first)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
