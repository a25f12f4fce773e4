"""The metrics log, its writers, and what a run shows."""

import io
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxpost.errors import ConfigError, DataError
from jaxpost.train import metrics as metrics_module
from jaxpost.train.metrics import MetricsLog, TensorBoardWriter, open_writers, read_rows
from jaxpost.train.progress import Progress, print_before_after, print_table


def test_rows_keep_every_digit_and_are_on_disk_at_once(tmp_path):
    row = {"step": 1, "loss": jnp.float32(0.1), "rewards/chosen": np.float64(1 / 3), "num_tokens": 2**40 + 1}
    with MetricsLog(tmp_path) as log:
        returned = log.write(row)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # not closed, not flushed by hand
    assert [json.loads(line) for line in lines] == [returned]
    assert returned["loss"] == float(np.float32(0.1)) and returned["rewards/chosen"] == 1 / 3
    assert returned["num_tokens"] == 2**40 + 1 and type(returned["num_tokens"]) is int


def test_what_json_does_not_have_is_null_and_comes_back_as_nan(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": jnp.float32(jnp.inf), "entropy": -math.inf, "x": 1.0})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line, parse_constant=refuse)["grad_norm"] is None
        (row,) = log.read()
    assert row.pop("x") == 1.0 and row.pop("step") == 1
    assert len(row) == 3 and all(math.isnan(value) for value in row.values())


def test_cut_removes_the_rows_after_the_restored_step_and_the_log_goes_on(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 10})
            if step == 3:
                log.write({"step": 3, "eval/loss": 0.5})
    with MetricsLog(tmp_path) as log:
        log.cut(3)
        log.write({"step": 4, "loss": 9.0})
        rows = log.read()
    assert [(row["step"], row.get("loss")) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3), (3, None), (4, 9.0)]
    assert rows == read_rows(tmp_path / "metrics.jsonl")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 0.5}]
    with MetricsLog(tmp_path) as log:
        log.write({"step": 2, "loss": 0.25})
        assert log.read() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_rows_survive_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from jaxpost.train.metrics import MetricsLog\n"
        "MetricsLog(sys.argv[1]).write({'step': 1, 'loss': 0.5}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{step: 2}\n')
    with pytest.raises(DataError, match=rf"^{path}:2: not a JSON object"):
        read_rows(path)


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path / "run") as log:
        assert log.write({"step": 1, "loss": jnp.float32(0.5)}) == {"step": 1, "loss": 0.5}
        log.cut(0)
        assert log.read() == []
    assert not (tmp_path / "run").exists()
    assert open_writers(("tensorboard",), tmp_path, {}) == []


def test_where_files_are_written_whole_rows_are_gathered(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    log = metrics_module._RemoteLog(path, seconds=3600)
    log.append('{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"st'
    log.flush()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    log.replace(['{"step": 1}'])
    assert path.read_text() == '{"step": 1}\n'
    eager = metrics_module._RemoteLog(path, seconds=0)
    eager.append('{"step": 3}')
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    log.append('{"step": 2}')
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_writers_get_every_row(tmp_path):
    class Keep:
        rows, closed = [], False

        def write(self, row):
            self.rows.append(row)

        def close(self):
            self.closed = True

    keep = Keep()
    with MetricsLog(tmp_path, [keep]) as log:
        log.write({"step": 1, "loss": jnp.float32(0.5)})
    assert keep.rows == [{"step": 1, "loss": 0.5}] and keep.closed


def tensorboard_values(run_dir):
    """{(tag, step): value} of all files, and the steps at which a writer restarted."""
    from tensorboardX import proto

    values, restarts = {}, []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")  # then its checksum, the event, its checksum
            event = proto.event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == proto.event_pb2.SessionLog.START:
                restarts.append(event.step)
            for value in event.summary.value:
                values[value.tag, event.step] = value.simple_value
    return values, restarts


def test_tensorboard_files_hold_the_rows_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    for steps in ((1, 2, 3), (3, 4)):
        writer = TensorBoardWriter(tmp_path)
        for step in steps:
            writer.write({"step": step, "loss": 0.5 * step, "entropy": math.nan})
        writer.close()
    values, restarts = tensorboard_values(tmp_path)
    assert values == {("loss", step): 0.5 * step for step in (1, 2, 3, 4)}
    assert restarts == [1, 3]


def test_wandb_gets_rows_under_the_name_of_the_run_folder(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finish"))
    init = lambda **options: calls.append(options) or run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writers = open_writers(("wandb",), tmp_path / "dpo-1", {"stage": "dpo"})
    with MetricsLog(tmp_path / "dpo-1", writers) as log:
        log.write({"step": 3, "loss": 0.5})
    assert calls[0]["name"] == calls[0]["id"] == "dpo-1" and calls[0]["resume"] == "allow"
    assert calls[0]["config"] == {"stage": "dpo"}
    assert calls[1:] == [(3, {"loss": 0.5}), "finish"]


def test_a_writer_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^run\.log_to: 'wandb' needs .* pip install 'jaxpost\[log\]'$"):
        open_writers(("wandb",), tmp_path, {})


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("jaxpost.train.progress.time.monotonic", lambda: clock.now)
    out = console(terminal=False)
    with Progress(1000, start_step=500, console=out) as bar:
        for step in range(501, 511):
            clock.now += 4.0
            bar.update(step, 0.69314, 1000.0)
    assert out.file.getvalue().splitlines() == [
        "step 501/1000  loss 0.6931  1,000 tokens/s  0:33:16 left",
        "step 504/1000  loss 0.6931  1,000 tokens/s  0:33:04 left",
        "step 507/1000  loss 0.6931  1,000 tokens/s  0:32:52 left",
        "step 510/1000  loss 0.6931  1,000 tokens/s  0:32:40 left",
    ]


def test_in_a_terminal_progress_is_a_bar_with_loss_speed_and_lines_above():
    out = console(terminal=True)
    with Progress(10, console=out) as bar:
        bar.update(4, 0.25, 1000.0)
        bar.update(5, 0.125, 2000.0)
        bar.print("[evaluation]")
    text = out.file.getvalue()
    assert "5/10" in text and "loss 0.1250" in text and "1,100 tokens/s" in text and "[evaluation]" in text


def test_other_hosts_show_nothing(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    out = console(terminal=True)
    with Progress(10, console=out) as bar:
        bar.update(4, 0.25, 1000.0)
        bar.print("hello")
    print_table("Run", [("steps", 1)], console=out)
    assert out.file.getvalue() == ""


def test_tables_show_numbers_and_texts_as_they_are():
    out = console(terminal=False)
    print_table("Run [a]", [("parameters", 1_234_567), ("padding", "12.5 %"), ("model", "runs/[b]")], console=out)
    print_before_after(["What is [b]2+2[/b]?"], ["What is 3+3?"], ["It is 4."], console=out)
    text = out.file.getvalue()
    for shown in ("Run [a]", "1,234,567", "12.5 %", "runs/[b]", "What is [b]2+2[/b]?", "What is 3+3?", "It is 4."):
        assert shown in text
