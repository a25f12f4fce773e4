"""Functions in processes of their own: what comes of calls that raise, hang, die, and of all the others beside them."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.tasks.functions import Function


def opened(name: str, workers: int = 2, timeout_s: float = 20.0) -> Function:
    return Function(f"tests.tasks.rewards:{name}", "score.path", workers=workers, timeout_s=timeout_s)


@pytest.fixture
def told():
    function = opened("told", timeout_s=0.5)
    yield lambda *answers: function([("Q", answer, {}) for answer in answers])
    function.close()


def processes_of(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line]


def test_values_in_the_order_of_the_calls():
    function = opened("length", workers=3)
    calls = [([{"role": "user", "content": "Q"}], "x" * n, {"bonus": 1000 * (n % 3)}) for n in range(300)]
    for _ in range(2):
        values, faults = function(calls)
        assert values.tolist() == [n + 1000 * (n % 3) for n in range(300)] and faults == {}
    assert function([])[0].shape == (0,)
    function.close()


FAULTS = {
    "raise": r"raised ValueError: no such \(.*rewards.py:\d+\)",
    "exit": r"raised SystemExit: 3 \(.*",
    "die": "its process ended with code 7",
    "killed": "its process ended with code -9",
    "sleep": r"took longer than 0\.5 s",
    "spin": r"took longer than 0\.5 s",
    "children": r"took longer than 0\.5 s",
    "nan": "returned nan, not a finite number",
    "infinite": "returned -inf, not a finite number",
    "none": "returned None, not a finite number",
    "text": r"returned '1\.0', not a finite number",
    "list": r"returned \[1\], not a finite number",
}


@pytest.mark.parametrize("answer", FAULTS)
def test_a_call_that_fails_costs_its_own_value_alone(told, answer):
    values, faults = told("a", "ab", answer, "abc", answer, "true", "print")
    np.testing.assert_array_equal(values, [1, 2, np.nan, 3, np.nan, 1, 5])
    assert list(faults) == [2, 4]
    for why in faults.values():
        assert re.fullmatch(FAULTS[answer], why), why
    assert told("abcd")[0].tolist() == [4]  # and there is somebody to call
    assert not processes_of(f"3600.{os.getpid()}")


def test_hanging_calls_among_many_that_do_not(told):
    answers = ["sleep" if n in (5, 6, 77) else "x" * (n + 1) for n in range(100)]
    values, faults = told(*answers)
    assert list(faults) == [5, 6, 77]
    np.testing.assert_array_equal(values, [np.nan if n in faults else n + 1 for n in range(100)])


def test_the_time_out_is_of_a_call_and_not_of_all(told):
    began = time.monotonic()
    values, faults = told(*["a"] * 50, "sleep", *["a"] * 50)
    assert 0.5 <= time.monotonic() - began < 10 and list(faults) == [50] and np.nansum(values) == 100


def test_cheap_calls_are_cheap():
    function = opened("length", workers=1)
    function([("Q", "a", {})])
    began = time.perf_counter()
    function([("Q", "a", {})] * 2000)
    assert time.perf_counter() - began < 2000 * 1e-3
    function.close()


def test_jax_is_not_loaded():
    function = opened("loads", workers=1)
    assert function([("Q", "a", {})])[0].tolist() == [0]
    function.close()


def test_close_leaves_no_process():
    function = opened("process", workers=2)
    found = {int(pid) for pid in function([("Q", "a", {})] * 50)[0]}
    assert found and os.getpid() not in found and all(os.path.exists(f"/proc/{pid}") for pid in found)
    function.close()
    assert not [pid for pid in found if os.path.exists(f"/proc/{pid}")]
    function.close()
    assert int(function([("Q", "a", {})])[0][0]) not in found  # called again, it starts again
    function.close()


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    code = (
        "import os, signal; from jaxpost.tasks.functions import Function\n"
        "f = Function('tests.tasks.rewards:process', 'score.path', workers=1, timeout_s=9)\n"
        "print(int(f([('Q', 'a', {})])[0][0]), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    wait_for = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < wait_for:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_call_that_nobody_ends_ends_itself():
    """As where the process that started it was killed; also while the interpreter is not given up."""
    code = (
        "from jaxpost.tasks.function_worker import call; from tests.tasks.rewards import told\n"
        "assert call(told, ('Q', 'abc', {}), 0.3) == ('value', 3.0); call(told, ('Q', 'spin', {}), 0.3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == -signal.SIGALRM


def test_an_interrupted_question_is_not_answered_later(told, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxpost.tasks.functions.wait", interrupted)
        told(*["x" * 9] * 20)
    assert told("a", "ab")[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "path, message",
    [
        ("tests.tasks.rewards:missing", "score.path: cannot import 'tests.tasks.rewards:missing' .*wanted pkg.mod:fn"),
        ("tests.tasks.nowhere:fn", "score.path: cannot import 'tests.tasks.nowhere:fn' .No module named"),
        ("broken:fn", "score.path: importing 'broken:fn' raised ZeroDivisionError"),
        ("dies:fn", "score.path: importing 'dies:fn': its process ended with code 4"),
        ("tests.tasks.rewards:not_callable", "score.path: 'tests.tasks.rewards:not_callable' is no function"),
    ],
)
def test_what_cannot_be_imported_is_named(path, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"^{message}"):
        Function(path, "score.path", workers=1, timeout_s=5)
    mine = [line for line in processes_of("jaxpost.tasks.function_worker") if line.split()[0] == str(os.getpid())]
    assert not mine
