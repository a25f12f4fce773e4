"""Times what stands between a file and the first step.

    python bench/data.py open                       # a million lines of about 300 bytes: opened cold, then warm
    python bench/data.py open --lines 10000000 --packing .zst

"cold" makes the index (and the unpacked copy), "warm" finds them in the cache; both with the file in the page cache,
which the writing left there. Each opening is a process of its own. What was seen: docs/performance.md.
"""

import argparse
import gzip
import hashlib
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("open", help="seconds until a file of lines is open")
    one.add_argument("--lines", type=int, default=1_000_000)
    one.add_argument("--packing", choices=["", ".gz", ".zst"], default="")
    one.add_argument("--folder", help="where the file is written; default: the system's folder for temporary files")
    one.set_defaults(run=run_open)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
