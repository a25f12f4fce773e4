"""Tokenising in processes of our own. `python -m jaxpost.data.workers` is one of them.

Not `multiprocessing`: its fork is unsafe once jax has started threads, and its spawn imports the user's script again,
which would have to guard itself. A worker gets its jobs and tasks through its standard input, pickled, and ends with
it, so none outlives the process that started it.
"""

import concurrent.futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpost.data.chunks import Chunk, Encoding, encode_chunk
from jaxpost.data.sources import Source, open_source
from jaxpost.errors import DataError

AHEAD = 3  # tasks given to a pool for each of its workers


class Job(NamedTuple):
    """A source, by its path and the fingerprint that it must still have, and how its records are encoded.

    cache: as of `open_source`.
    """

    path: str
    fingerprint: str
    encoding: Encoding
    cache: str | None


class Task(NamedTuple):
    """Some records of one source."""

    job: int
    records: np.ndarray


class Workers:
    """Processes that encode tasks, started as tasks come in, ended by `close` or with the object."""

    def __init__(self, count: int, jobs: Sequence[Job]):
        self.count = count
        self._jobs = pickle.dumps(list(jobs))
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "tokenise")  # one waits for each process
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen] = []
        self._starting, self._closed = threading.Lock(), False
        self._finalizer = weakref.finalize(self, _end, self._processes)

    def submit(self, task: Task) -> concurrent.futures.Future:
        """The chunk. Its errors: DataError of the file, or of a process that died."""
        return self._threads.submit(self._encode, task)

    def map(self, tasks: Iterable[Task]) -> Iterator[Chunk]:
        """The chunks in the order of the tasks."""
        running: list[concurrent.futures.Future] = []
        for task in tasks:
            running.append(self.submit(task))
            if len(running) >= AHEAD * self.count:
                yield running.pop(0).result()
        for future in running:
            yield future.result()

    def close(self) -> None:
        """Ends the processes; tasks that are not done are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._starting:  # none is started behind our back
            self._closed = True
            self._finalizer()
        self._threads.shutdown(wait=True)

    def _encode(self, task: Task) -> Chunk:
        process, fresh = self._process()
        try:
            if fresh:
                process.stdin.write(self._jobs)
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            kind, value = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # ValueError: closed meanwhile
            raise DataError(
                f"data.workers: a tokenising process ended with code {process.wait()} (out of memory?); "
                "use fewer, or 0 for none"
            ) from None
        self._idle.put(process)
        if kind == "fault":
            raise DataError(value)
        if kind == "crash":
            raise RuntimeError(f"in a tokenising process:\n{value}")
        return Chunk.unpack(value)

    def _process(self) -> tuple[subprocess.Popen, bool]:
        """(one that has nothing to do, whether it was started just now)."""
        with self._starting:
            if self._closed:
                raise concurrent.futures.CancelledError
            if not self._idle.empty():
                return self._idle.get(), False
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._processes.append(start_python("jaxpost.data.workers", **pipes))
            return self._processes[-1], True


def start_python(module: str, **settings) -> subprocess.Popen:
    """`python -m module`, which finds what this process finds. settings: of Popen."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # An accelerator belongs to the process that trains; one thread each, as there is one process a core.
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-P", "-m", module], env=environment, **settings)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()  # nothing of theirs is lost: they write no files
        process.wait()
        process.stdout.close()
        with contextlib.suppress(OSError):  # what was left in its buffer has no reader any more
            process.stdin.close()
    processes.clear()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """Encodes tasks in this process. Templates keep notes while they render, so it has copies, and one task a time."""

    def __init__(self, jobs: Sequence[Job], sources: dict[int, Source] | None = None):
        self._jobs = pickle.loads(pickle.dumps(list(jobs)))
        self._sources = dict(sources or {})
        self._lock = threading.Lock()

    def encode(self, task: Task) -> Chunk:
        """Raises DataError: a fault of the file, or another file than the job was made for."""
        with self._lock:
            path, fingerprint, encoding, cache = self._jobs[task.job]
            if task.job not in self._sources:
                source = open_source(path, cache)
                if source.fingerprint != fingerprint:
                    raise DataError(f"{path}: the file was changed while it was read")
                self._sources[task.job] = source
            return encode_chunk(encoding, self._sources[task.job], task.records)


def main() -> None:
    """The loop of a worker: jobs first, then tasks until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us, and ends our input
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not end up among the results
    encoder = Encoder(pickle.load(tasks))
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer = "chunk", encoder.encode(task).pack()
        except DataError as error:
            answer = "fault", str(error)
        except Exception:
            answer = "crash", traceback.format_exc()
        pickle.dump(answer, results)
        results.flush()


if __name__ == "__main__":
    main()
