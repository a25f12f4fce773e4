"""`python -m jaxpost.tasks.function_worker`: a process in which a function of somebody else's is called.

It is told over its standard input, a socket, what to import and then what to call it with, and says after each call
what came of it. It imports nothing of ours that would load jax.
"""

import math
import os
import signal
import traceback
from multiprocessing.connection import Connection

from jaxpost.errors import ConfigError
from jaxpost.schema import imported

GRACE_S = 5.0  # beyond the time-out, after which the process ends itself: nobody is left to end it


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us, and ends our input
    channel = Connection(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # who reads the input gets nothing,
    os.dup2(2, 1)  # and what is printed stands among the errors
    try:
        key, path, timeout_s = channel.recv()
        function = imported(key, path)
        if not callable(function):
            raise ConfigError(f"{key}: {path!r} is no function")
    except ConfigError as error:
        channel.send(("fault", str(error)))
        return
    except BaseException as error:  # whatever a module raises while it is imported
        channel.send(("fault", f"{key}: importing {path!r} {_raised(error)}"))
        return
    channel.send(("ready", None))
    while True:
        try:
            calls = channel.recv()
        except EOFError:
            return
        for arguments in calls:
            channel.send(call(function, arguments, timeout_s + GRACE_S))


def call(function, arguments: tuple, most_s: float) -> tuple[str, float | str]:
    """("value", a finite number) or ("fault", why there is none). The process ends after most_s."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # by the system, whatever the function is doing
    signal.setitimer(signal.ITIMER_REAL, most_s)
    try:
        value = function(*arguments)
    except BaseException as error:  # sys.exit too
        return "fault", _raised(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    number = _number(value)
    return ("value", number) if math.isfinite(number) else ("fault", f"returned {value!r:.80}, not a finite number")


def _number(value) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # as its type likes
        return math.nan


def _raised(error: BaseException) -> str:
    """What was raised and where, in one line."""
    text = next(iter(str(error).splitlines()), "")[:200]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}{f': {text}' if text else ''}{place}"


if __name__ == "__main__":
    main()
