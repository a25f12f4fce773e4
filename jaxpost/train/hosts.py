"""Several processes as one run, a host each: how they join, the check that all run the same, what they tell each other.

What they tell goes through the key-value store of jax's coordinator, which lives in process 0, and touches no device.
Every function that waits for the others is called by all of them, in the same order, from the main thread.
"""

import atexit
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import pathlib
import platform
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax takes it from here too
from jax.experimental import multihost_utils

from jaxpost.config import flatten
from jaxpost.errors import HostError, UserError

log = logging.getLogger("jaxpost")

PREFIX = "jaxpost"  # of all keys
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Where a host keeps its files and how many processes tokenise is its own affair.
OWN = ("hosts.index", "data.workers", "data.cache_dir", "reference.cache_dir", "run.compilation_cache")
LONG_SECONDS = 24 * 3600  # between steps: who is dead or hangs meanwhile, the watchdog says
MARGIN_S = 120  # by which our own message is ahead of jax's, which aborts the process
_rounds = itertools.count()  # of told, gathered and wait: the same on every host


def count() -> int:
    """Processes of the run. Asks for no device."""
    return distributed.global_state.num_processes if distributed.global_state.client else 1


def index() -> int:
    """Which of them this one is."""
    return distributed.global_state.process_id if distributed.global_state.client else 0


def first() -> bool:
    """Whether this is the one that writes logs and files."""
    return index() == 0


def store():
    """The key-value store, None in a run of one process."""
    return distributed.global_state.client


def join(config) -> None:
    """Connects to the other hosts where `hosts.coordinator` says so; at once where it has been done.

    Before anything that asks jax for a device. Raises HostError when they do not all come within `hosts.timeout_s`, or
    do not run the same (`agree`).
    """
    settings = config.hosts
    if settings.coordinator is None:
        return
    if not jax.distributed.is_initialized():
        _initialize(settings)
        if not first():
            log.setLevel(logging.ERROR)  # what concerns all is said once
        atexit.register(leave)
    agree(config)


def _initialize(settings) -> None:
    where = {} if settings.coordinator == "auto" else {"coordinator_address": settings.coordinator}
    # jax would abort the process with a stack of C++; this is said in a line before.
    timer = threading.Timer(settings.timeout_s, end, (2, f"error: {_absent(settings)}"))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **where,
            num_processes=settings.count,
            process_id=settings.index,
            initialization_timeout=math.ceil(settings.timeout_s) + MARGIN_S,
            heartbeat_timeout_seconds=math.ceil(settings.silence_s) + MARGIN_S,
            shutdown_timeout_seconds=math.ceil(settings.timeout_s),
        )
    except ValueError as error:
        raise HostError(
            f"hosts.coordinator: {settings.coordinator!r}, but jax finds no cluster here ({error})"
        ) from None
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise HostError("hosts.coordinator: this process has used jax before; hosts join first of all") from None
        raise HostError(f"{_absent(settings)}: {_one_line(error)}") from None
    finally:
        timer.cancel()


def _absent(settings) -> str:
    this = "" if settings.index is None else f" (this is host {settings.index} of {settings.count})"
    return f"hosts.timeout_s: not all hosts joined at {settings.coordinator} within {settings.timeout_s:g} s{this}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def end(code: int, line: str) -> None:
    """Ends the process from any thread, whatever its main thread hangs in."""
    print(line, file=sys.stderr, flush=True)
    os._exit(code)


def leave() -> None:
    """Waits for the other hosts and disconnects: at the end of the process."""
    if store() is not None:
        jax.distributed.shutdown()


# ---- the check ----


def agree(config) -> None:
    """Raises HostError, on every host, where config, code, versions or devices are not those of host 0."""
    own = {name: value for name, value in flatten(config).items() if name not in OWN}
    found = {"config": own, "code": {"jaxpost": code_digest()[:16]}, "version": versions()}
    _compare(gathered(found, config.hosts.timeout_s))
    devices = {"local": jax.local_device_count(), "global": jax.device_count(), "kind": jax.devices()[0].device_kind}
    _compare(gathered({"devices": devices}, config.hosts.timeout_s))


def _compare(found: list[dict[str, dict]]) -> None:
    """HostError for the first host that differs from host 0, naming the key and both values."""
    says = {
        "config": "{key}: {theirs!r} on host {host}, {ours!r} on host 0; all hosts must be given the same config",
        "code": "hosts: the code of {key} on host {host} is not that on host 0 ({theirs}, {ours}); install the same",
        "version": "hosts: {key} is {theirs} on host {host}, {ours} on host 0; install the same",
        "devices": "hosts: host {host} sees {theirs} {key} devices, host 0 {ours}; all must see the same number",
    }
    for host, theirs in enumerate(found):
        for part, ours in found[0].items():
            for key in {**ours, **theirs[part]}:
                values = {"theirs": theirs[part].get(key), "ours": ours.get(key)}
                if values["theirs"] != values["ours"]:
                    raise HostError(says[part].format(key=key, host=host, **values))


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what is computed."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def code_digest() -> str:
    """sha256 of the sources of this package."""
    folder = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


# ---- what they tell each other ----


def gathered(value: Any, timeout_s: float = LONG_SECONDS) -> list[Any]:
    """What every host gives, as JSON, in the order of the hosts."""
    if count() == 1:
        return [value]
    number = next(_rounds)
    key = f"{PREFIX}/gathered/{number}"
    store().key_value_set(f"{key}/{index()}", json.dumps(value))
    found = [json.loads(_get(f"{key}/{host}", host, timeout_s)) for host in range(count())]
    store().key_value_delete(f"{PREFIX}/gathered/{number - 1}/{index()}")  # all have read it, or were not here
    return found


def told(make: Callable[[], Any]) -> Any:
    """What `make` gives on host 0, as JSON, on every host; a UserError that it raises there is raised everywhere."""
    if count() == 1:
        return make()
    outcome, error = None, None
    if first():
        try:
            outcome = {"value": make()}
        except UserError as raised:
            outcome, error = {"error": type(raised).__name__, "text": str(raised)}, raised
    outcome = gathered(outcome)[0]
    if error is not None:
        raise error
    if "error" in outcome:
        raise _error_class(outcome["error"])(outcome["text"])
    return outcome["value"]


def wait() -> None:
    """Until every host is here."""
    gathered(None)


def all_of(flag: bool) -> bool:
    """Whether it holds on every host."""
    return all(gathered(flag))


def _get(key: str, host: int, timeout_s: float) -> str:
    try:
        return store().blocking_key_value_get(key, math.ceil(1000 * timeout_s))
    except RuntimeError as error:
        raise HostError(f"hosts: no word from host {host} in {timeout_s:g} s ({_one_line(error)})") from None


def _error_class(name: str) -> type[UserError]:
    """The subclass of UserError of that name."""
    classes = [UserError]
    for one in classes:
        classes += one.__subclasses__()
    return next(one for one in classes if one.__name__ == name)


class Stop:
    """Whether to stop after the present step, on all hosts after the same: SIGTERM on any of them asks for it.

    Calls are counted: every host makes them at the same places of the loop.
    """

    def __init__(self):
        self._calls, self._stopped = 0, False

    def __call__(self) -> bool:
        self._calls += 1
        self._stopped = self._stopped or multihost_utils.reached_preemption_sync_point(self._calls)
        return self._stopped
