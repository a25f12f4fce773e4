"""Plans: of a small Llama for a slice that is not here, by the TPU compiler; and what is counted from shapes alone."""

import json
import math
import re
import types

import pytest

from jaxpost import cli
from jaxpost import config as configs
from jaxpost.errors import ConfigError
from jaxpost.plan import chips, ledger, planner, promise, search

D, L, H, K, h, F, V, T, ROWS = 1024, 4, 4, 2, 128, 2048, 4096, 256, 8
LAYER = D * h * 2 * (H + K) + 3 * D * F
NORMS = (2 * L + 1) * D
PARAMETERS = L * LAYER + 2 * V * D + NORMS


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder with the config.json of a small Llama, and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    sizes = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K}
    sizes |= {"head_dim": h, "intermediate_size": F, "vocab_size": V, "max_position_embeddings": 4096}
    other = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(sizes | other | {"tie_word_embeddings": False}))
    return str(folder)


def settings(shape, stage="dpo", **sections):
    values = {
        "model": {"path": shape},
        "data": {"train": "pairs.jsonl", "eval_examples": 0},
        "batch": {"rows_per_step": ROWS, "tokens_per_row": T, "documents_per_row": 4},
        "precision": {"params": "bfloat16", "moments": "bfloat16"},
        "remat": {"policy": "full"},
        "run": {"steps": 10},
    }
    values |= {"reference": {"mode": "live"}} if stage == "dpo" else {}
    merged = {name: values.get(name, {}) | sections.get(name, {}) for name in values | sections}
    return configs.resolve(merged | {"stage": stage})


def written(config, folder):
    """The path of a config file."""
    path = folder / "small.py"
    path.write_text(f"def get_config():\n    return {configs.to_dict(config)!r}\n")
    return path


@pytest.fixture(scope="module")
def compiled(shape):
    """A DPO step over fsdp 8, compiled."""
    pytest.importorskip("libtpu")
    return planner.plan(settings(shape, plan={"price_per_chip_hour": 1.2}), "v5e:2x4")


def test_arguments_are_what_their_shapes_say(compiled):
    (program,) = compiled.programs
    whole = (PARAMETERS - NORMS) // 8 + NORMS  # norms are copied
    assert program.ledger["parameters"] == program.ledger["reference"] == 2 * whole
    assert program.ledger["moments"] == pytest.approx(4 * whole, abs=64)  # and counters
    arguments = sum(program.ledger[name] for name in ("parameters", "moments", "reference", "batch", "carry"))
    assert program.arguments == pytest.approx(arguments, rel=0.01)  # the compiler pads small ones


def test_weights_are_gathered_twice_and_gradients_reduced_once(compiled):
    """Forward and backward of the policy, forward of the reference: three gathers of what products read."""
    (program,) = compiled.programs
    products = 2 * (L * LAYER + V * D)  # bytes; the embedding is never gathered
    assert sum(program.gathered.values()) <= 1.1 * 3 * products
    assert sum(program.gathered.values()) >= 0.99 * 3 * products - 2 * V * D  # so small a head is kept gathered
    received = sum(size for name, size in program.collectives.items() if not name.startswith("all-gather"))
    gathers = program.collectives.get("all-gather over fsdp", 0)
    gradients = 2 * PARAMETERS * 7 / 8  # of a reduce-scatter, received
    # Activations that are exchanged for the embedding, and metrics, are small beside these.
    assert gathers + received <= 1.1 * 3 * products * 7 / 8 + 1.1 * gradients + 4 * ROWS * T * D * 2


def test_work_is_that_of_the_shapes(compiled):
    (program,) = compiled.programs
    tokens = ROWS * T
    forward = tokens * 2 * (L * LAYER + V * D) + 4 * H * h * L * ROWS * T * T / 2
    assert program.model_flops == pytest.approx(4 * forward)  # forward, backward, reference
    # Remat computes the layers' forward pass once more, the head's products are made again, blocks are whole.
    assert program.model_flops / 8 < program.flops < 1.7 * program.model_flops / 8
    assert program.bound == max(program.roofline, key=program.roofline.get)
    assert compiled.seconds == program.seconds and compiled.tokens == tokens
    assert compiled.cost_per_step == pytest.approx(1.2 * 8 * compiled.seconds / 3600)


def test_a_plan_is_made_once_and_reads_back_as_it_was(compiled, shape, monkeypatch):
    monkeypatch.setattr(planner, "planned_on", lambda *_, **__: pytest.fail("planned again"))
    again = planner.plan(settings(shape, plan={"price_per_chip_hour": 1.2}), "v5e:2x4")
    assert again == compiled


def test_the_command_ends_with_the_peak_and_the_verdict(compiled, shape, capsys, tmp_path):
    path = written(settings(shape, plan={"price_per_chip_hour": 1.2}), tmp_path)
    arguments = ["plan", f"--config={path}", "--topology=v5e:2x4"]
    assert cli.main(arguments) == 0
    *_, peak, verdict = capsys.readouterr().out.strip().splitlines()
    assert peak == f"peak {compiled.peak / 2**30:.2f} GiB of 15.75 GiB a device" and verdict == "fits"
    assert cli.main([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["programs"][0]["peak"] == compiled.programs[0].peak


def test_what_does_not_fit(shape):
    found = planner.estimate(settings(shape, batch={"tokens_per_row": 1 << 22}), "h100:8")
    assert found.estimated and not found.fits and found.peak > found.usable


STAGES = {
    "sft": {},
    "kto": {"reference": {"mode": "cached"}},
    "reward": {},
    "distill": {"teacher": {"path": "SHAPE"}},
    "simpo": {},
    "ppo": {"score": {"reward": ("SHAPE",)}, "sampling": {"max_new_tokens": 32}, "rollout": {"max_prompt_tokens": 32}},
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_planned(shape, stage):
    sections = json.loads(json.dumps(STAGES[stage]).replace("SHAPE", shape))
    found = planner.estimate(settings(shape, stage, **sections), "h100:8")
    programs = {program.name: program for program in found.programs}
    first = found.programs[0]
    assert first.ledger["parameters"] > 0 and first.ledger[ledger.GRADIENTS] > 0 and found.seconds > 0
    if stage == "distill":
        assert first.ledger["teacher"] == pytest.approx(first.ledger["parameters"], rel=0.01)
    if stage == "ppo":
        assert list(programs) == ["update", "prefill", "admit", "decode", "scoring"]
        # While completions are drawn the rest of the run lies beside: moments, value model, reference, reward model.
        trained = first.ledger["parameters"]
        policy = programs["decode"].ledger["policy"]
        reward, reference = programs["scoring"].ledger["reward"], first.ledger["reference"]
        beside = first.ledger["moments"] + trained - policy + reference + reward
        assert programs["decode"].elsewhere == pytest.approx(beside, rel=0.01)


def test_adapters_hold_the_base_once(shape):
    found = planner.estimate(settings(shape, lora={"rank": 4}), "h100:8").programs[0].ledger
    assert found["base"] == 2 * ((PARAMETERS - NORMS) // 8 + NORMS) and found["parameters"] < found["base"] / 4
    assert "reference" not in found


def test_a_quantised_base_is_counted_in_its_bytes(shape):
    """int8: a byte an entry and a f32 for each block of 64 inputs (of H for o, cut by heads); the rest in bfloat16."""
    found = planner.estimate(settings(shape, lora={"rank": 4, "quantize": "int8"}), "h100:8").programs[0].ledger
    entries, of_o, rest = L * LAYER // 8, L * H * h * D // 8, 2 * V * D // 8
    scales = (entries - of_o) // 64 + of_o // H
    assert found["base"] == entries + 4 * scales + 2 * (rest + NORMS)


def test_a_search_finds_settings_that_fit(shape, monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda config, topology, cache: planner.estimate(config, topology))
    found = search.search(settings(shape), "h100:8", best=4)
    assert len(found) == 4 and all(plan.fits for plan in found)
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    sizes = [math.prod(plan.mesh.values()) for plan in found]
    assert sizes == [8] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"--topology: missing"),
        (["--topology=v5e:3x3"], r"v5e comes as 1x1, 2x2, 2x4"),
        (["--topology=v9:2x2"], r"no chip 'v9'; there are v4, v5e"),
        (["--topology=h100:8", "--config.offload.moments=True"], r"offload\.moments: True.*TPUs only"),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=4"], r"mesh\.fsdp=4.*must be the 8 devices"),
        (
            ["--topology=v5e:2x4", "--config.mesh.tensor=8", "--config.mesh.fsdp=1"],
            r"mesh\.tensor=8: does not divide.*'heads'",
        ),
        (["--topology=v5e:2x4", "--config.batch.tokens_per_row=200"], r"batch\.tokens_per_row.*128"),
        (
            ["--topology=v5e:2x4", "--config.batch.tokens_per_row=258", "--config.mesh.context=4"],
            r"do not divide by mesh\.context=4",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(shape, arguments, words, capsys, tmp_path):
    if arguments:
        pytest.importorskip("libtpu")
    path = written(settings(shape), tmp_path)
    assert cli.main(["plan", f"--config={path}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert re.search(words, error), error


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'jaxpost\[tpu\]'"):
        chips.open_topology("v5e:2x4")


class Device:
    """A TPU that says what it is and what it held."""

    platform, process_index = "tpu", 0

    def __init__(self, n):
        self.id, self.device_kind, self.coords = n, "TPU v5 lite", (n % 4, n // 4, 0)

    def memory_stats(self):
        return {"peak_bytes_in_use": 3 * 2**30}


def test_a_run_is_shown_beside_its_plan(shape, monkeypatch, capsys):
    monkeypatch.setattr(promise.jax, "devices", lambda: [Device(n) for n in range(8)])
    monkeypatch.setattr(promise.jax, "local_devices", lambda: [Device(0)])
    found = promise.promise(settings(shape))
    assert found.peak == planner.estimate(settings(shape), "v5e:2x4").peak
    run = types.SimpleNamespace(rows=[{"tokens_per_second": 5.0}, {"eval/loss": 1.0}, {"tokens_per_second": 7.0}])
    promise.compare(found, run)
    out = capsys.readouterr().out
    assert "plan: v5e, 8 devices" in out and f"{found.peak / 2**30:.2f} -> 3.00 GiB" in out
    assert re.search(r"at most [\d,]+ -> 6", out)


def test_no_plan_is_shown_of_a_cpu(shape):
    assert promise.promise(settings(shape)) is None


def test_what_waits_on_the_host_is_counted_there(shape):
    pytest.importorskip("libtpu")
    here = planner.estimate(settings(shape), "v5e:2x4").programs[0]
    away = planner.estimate(settings(shape, offload={"moments": True, "reference": True}), "v5e:2x4").programs[0]
    assert away.ledger.get("moments", 0) < 64 and here.ledger["moments"] > 0  # counters stay
    moved = here.ledger["moments"] + here.ledger["reference"]
    assert away.host == pytest.approx(moved, abs=64) and away.needs == pytest.approx(here.needs - moved, abs=64)
