"""Functions that score answers: good ones, and all that others do."""

import os
import re
import signal
import subprocess
import sys
import time


def length(question, answer, record) -> float:
    return len(answer) + record.get("bonus", 0)


def told(question, answer, record) -> float:
    """Does what the answer says."""
    if answer == "raise":
        raise ValueError("no such\nanswer")
    if answer == "exit":
        sys.exit(3)
    if answer == "die":
        os._exit(7)
    if answer == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "sleep":
        time.sleep(60)
    if answer == "spin":
        re.match(r"(a+)+$", "a" * 64 + "b")  # does not give up the interpreter
    if answer == "children":
        subprocess.run(["sleep", f"3600.{os.getppid()}"])
    if answer == "print":
        print("said", input() if sys.stdin.readable() and sys.stdin.read(1) else "")
    return {"nan": float("nan"), "none": None, "text": "1.0", "list": [1], "infinite": -float("inf"), "true": True}.get(
        answer, float(len(answer))
    )


def loads(question, answer, record) -> float:
    return float("jax" in sys.modules)


def process(question, answer, record) -> float:
    return os.getpid()


not_callable = 3
