"""A function of somebody else's (a verifier, a reward), called in processes of our own, each call with a time-out.

Not in threads, where `signal` does not work and what hangs cannot be ended; and not by `multiprocessing` or what is
built upon it, whose workers import the user's script again.
"""

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait

import numpy as np

from jaxpost.data.workers import start_python
from jaxpost.errors import ConfigError

START_S = 60.0  # to import the function
PIECES = 4  # a worker is given its share of the calls in so many pieces, so that none waits long for another
MOST_AT_ONCE = 64  # calls


@dataclasses.dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    channel: Connection
    deadline: float  # of what it is doing
    ready: bool = False
    given: collections.deque[int] = dataclasses.field(default_factory=collections.deque)  # calls; it is at the first

    def fileno(self) -> int:
        return self.channel.fileno()

    @property
    def busy(self) -> bool:
        return bool(self.given) or not self.ready

    def kill(self) -> int:
        """Ends it, and whatever it has started. Its exit code, which is its own where it had ended."""
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.channel.close()
        return self.process.wait() if code is None else code


class Function:
    """`pkg.mod:fn` as something to call with many arguments at once.

    A call that takes longer than `timeout_s` is ended with its process, and another process takes its place. None of
    them outlives `close`, or the process that started them.

    Raises ConfigError, which names `key`, for what cannot be imported.
    """

    def __init__(self, path: str, key: str, *, workers: int, timeout_s: float):
        self.path, self._key, self._count, self._timeout_s = path, key, workers, timeout_s
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._workers)
        self._start()
        try:
            while not self._workers[0].ready:
                self._step([], {}, {})
        except BaseException:
            self.close()
            raise

    def __call__(self, calls: Sequence[tuple]) -> tuple[np.ndarray, dict[int, str]]:
        """(f64[C], NaN where a call gave no finite number; {index: why} of those, in order).

        calls: the arguments of each, picklable.
        """
        values, faults = np.full(len(calls), np.nan), {}
        left = collections.deque(range(len(calls)))
        size = min(MOST_AT_ONCE, -(-len(calls) // (self._count * PIECES)))
        try:
            while left or any(worker.given for worker in self._workers):
                for worker in [worker for worker in self._workers if not worker.busy]:
                    if worker.process.poll() is not None:  # it died of something else than a call
                        self._end(worker)
                while len(self._workers) < min(self._count, len(left)):
                    self._start()
                for worker in [worker for worker in self._workers if not worker.busy and left]:
                    self._give(worker, calls, [left.popleft() for _ in range(min(size, len(left)))])
                self._step(left, values, faults)
        finally:  # whoever is still busy was interrupted, and would answer to the next question with this one's
            for worker in [worker for worker in self._workers if worker.given]:
                self._end(worker)
        return values, dict(sorted(faults.items()))

    def close(self) -> None:
        """Ends the processes; more start where it is called again."""
        _end(self._workers)

    def _start(self) -> None:
        ours, theirs = Pipe()
        process = start_python("jaxpost.tasks.function_worker", stdin=theirs.fileno(), start_new_session=True)
        theirs.close()
        self._workers.append(_Worker(process, ours, time.monotonic() + START_S))
        with contextlib.suppress(OSError):  # it has died; that is seen where it is listened to
            ours.send((self._key, self.path, self._timeout_s))

    def _give(self, worker: _Worker, calls: Sequence[tuple], indices: list[int]) -> None:
        worker.given.extend(indices)
        worker.deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):
            worker.channel.send([calls[index] for index in indices])

    def _step(self, left, values, faults: dict[int, str]) -> None:
        """Waits for the next that has something to say, or has taken too long."""
        busy = [worker for worker in self._workers if worker.busy]
        soonest = min(worker.deadline for worker in busy)
        heard = wait(busy, max(0.0, soonest - time.monotonic()))
        for worker in busy:
            if worker in heard:
                why = self._hear(worker, values, faults)
            else:
                late = time.monotonic() > worker.deadline
                why = f"took longer than {self._timeout_s if worker.ready else START_S:g} s" if late else None
            if why is None:
                continue
            code = self._end(worker)
            why = why or f"its process ended with code {code}"
            if not worker.ready:
                raise ConfigError(f"{self._key}: importing {self.path!r}: {why}")
            faults[worker.given.popleft()] = why
            left.extendleft(reversed(worker.given))  # the others are for somebody else

    def _hear(self, worker: _Worker, values, faults: dict[int, str]) -> str | None:
        """Takes in all that it has said. "" where it has ended."""
        try:
            while worker.channel.poll():
                kind, value = worker.channel.recv()
                if kind == "ready":
                    worker.ready = True
                    continue
                if not worker.ready:
                    raise ConfigError(value)
                index = worker.given.popleft()
                worker.deadline = time.monotonic() + self._timeout_s
                if kind == "value":
                    values[index] = value
                else:
                    faults[index] = value
        except (EOFError, OSError):
            return ""
        return None

    def _end(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
