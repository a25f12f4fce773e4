"""Who is dead and what hangs: a thread that says so, in one line, while the main thread waits for ever.

It knows the phase of the step that the main thread is in (data, update, evaluation, checkpoint, rollout, scoring). Of a
run of several hosts it tells the others every second, so that of a step that hangs everywhere one sees whose data, or
whose reward function, all the others wait for.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax

from jaxpost.errors import UserError
from jaxpost.train import hosts

GONE = 4  # exit code where another host is dead or has failed
HUNG = 5  # where a phase took longer than hosts.step_timeout_s, and hosts.on_step_timeout is "end"
EVERY_S = 1.0  # between two looks
LINGER_S = 3 * EVERY_S  # that the first host, whose end aborts the others, waits for them to end by themselves
_handlers: list = []  # kept: C calls them


@dataclasses.dataclass(frozen=True)
class Phase:
    """name: what the main thread does; step: of which step, None before the first and after the last one."""

    name: str
    step: int | None
    since: float  # time.monotonic

    def __str__(self):
        return self.name if self.step is None else f"{self.name} of step {self.step}"


class _Main:
    """The phase that the main thread of this process is in."""

    phase = Phase("start", None, 0.0)


def enter(name: str, step: int | None = None) -> None:
    """The main thread begins a phase; only those of a step are held against `hosts.step_timeout_s`."""
    _Main.phase = Phase(name, step, time.monotonic())


class Watchdog:
    """The thread, for as long as the `with` block lasts; nothing in a run of one process without a bound.

    Of several hosts, an error that leaves the block ends them all: each says which it was, and exits with 2 for a
    UserError, 1 for another error, GONE where it was another host's.
    """

    def __init__(self, settings):
        self.settings = settings
        self._several = hosts.count() > 1
        self._done = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # newest sign of life of each host, and when it came
        self._said: Phase | None = None  # the phase that was said to hang
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        enter("start")
        if self._several or self.settings.step_timeout_s is not None:
            self._thread.start()
        if not hosts.first():
            on_abort(self._aborted)
        return self

    def __exit__(self, _, error, __):
        if error is not None and self._several:
            self._fail(error)
        enter("end")
        if self._several and error is None:
            hosts.wait()  # while all are still watched: the first may have an export to finish
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
        began = time.monotonic()
        self._seen = {host: ("", began) for host in range(hosts.count()) if host != hosts.index()}
        while not self._done.wait(EVERY_S):
            self._look_at_phase()
            if self._several:
                self._look_at_others()

    # ---- this host ----

    def _look_at_phase(self):
        phase, bound = _Main.phase, self.settings.step_timeout_s
        seconds = time.monotonic() - phase.since
        if bound is None or phase.step is None or seconds <= bound or phase is self._said:
            return
        self._said = phase
        frame = sys._current_frames().get(threading.main_thread().ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        line = f"hosts.step_timeout_s: host {hosts.index()} is in {phase} for {seconds:.0f} s"
        line += "".join(f"; host {host}: {_phase(said)}" for host, (said, _) in sorted(self._seen.items()))
        if self.settings.on_step_timeout == "warn":
            print(f"{stack}{line}", file=sys.stderr, flush=True)
        else:
            print(stack, end="", file=sys.stderr, flush=True)
            self._end(HUNG, line)

    # ---- the others ----

    def _tell(self, what: str, value):
        with contextlib.suppress(RuntimeError):  # the coordinator is gone: nobody is left to be told
            key = f"{hosts.PREFIX}/{what}/{hosts.index()}"
            hosts.store().key_value_set(key, json.dumps(value), allow_overwrite=True)

    def _heard(self, what: str) -> dict[int, str]:
        """{host: what it told} of those that told anything of this kind."""
        found = hosts.store().key_value_dir_get(f"{hosts.PREFIX}/{what}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def _look_at_others(self):
        phase = _Main.phase
        now = time.monotonic()
        self._tell("phase", f"{phase} for {now - phase.since:.0f} s|{now}")
        try:
            failed, phases = self._heard("failed"), self._heard("phase")
        except RuntimeError:  # jax ends this process by itself when the coordinator is gone
            return
        for host, told in failed.items():
            if host != hosts.index():
                told = json.loads(told)
                self._end(2 if told["code"] == 2 else GONE, f"host {host} ended: {told['line']}")
        for host, (said, when) in self._seen.items():
            told = phases.get(host, "")
            if told != said:
                self._seen[host] = told, now
            elif now - when > self.settings.silence_s:
                self._lost(host, now - when)

    def _lost(self, host: int, seconds: float):
        line = (
            f"host {host} has given no sign of life for {seconds:.0f} s (hosts.silence_s={self.settings.silence_s:g}), "
            f"last seen in {_phase(self._seen[host][0])}: killed, or its machine is gone. Host {hosts.index()} ends "
            f"too, in {_Main.phase}; start all hosts again with run.resume=True"
        )
        self._end(GONE, line)

    def _aborted(self):
        line = (
            f"jax has ended host {hosts.index()} in {_Main.phase}, for the reason above; it does so at once where "
            "host 0, which coordinates, is gone. Start all hosts again with run.resume=True"
        )
        hosts.end(GONE, f"error: {line}")

    def _end(self, code: int, line: str):
        """Ends this process, told to the others; the first waits until these have ended too, or jax aborts them."""
        print(f"error: {line}", file=sys.stderr, flush=True)
        if self._several:
            self._tell("failed", {"code": code, "line": line})
            time.sleep(LINGER_S if hosts.first() else 0)
        sys.stdout.flush()
        os._exit(code)

    def _fail(self, error: BaseException):
        """Ends this host and, by telling them why, the others."""
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # A collective that fails since another host died is not the cause: that one is named when it is silent.
            print("waiting for what the other hosts say", file=sys.stderr, flush=True)
            time.sleep(self.settings.silence_s + 3 * EVERY_S)
        code = 2 if isinstance(error, UserError) else 1
        line = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        self._done.set()
        self._end(code, line)


def on_abort(act: Callable[[], None]) -> None:
    """Has `act` called when the process aborts, in the thread that does.

    jax's client aborts from a thread of its own as soon as the coordinator is gone, and takes no callback of Python. A
    handler of the module `signal` would wait for the main thread, which never comes.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _phase(told: str) -> str:
    """What a host told of its phase, without the time that makes each sign of life another."""
    return json.loads(told).partition("|")[0] if told else "its start"
