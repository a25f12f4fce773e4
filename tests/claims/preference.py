"""DPO: on the embedded world, and on real dialogues."""

import tempfile
import time

import numpy as np

import jaxpost
from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.train.reference import compute_logps
from jaxpost.train.setup import open_data, open_mesh, open_model
from tests.claims.runs import SEEDS, train
from tests.shared import SHARED


def embedded_world() -> list[tuple]:
    """Base answers nothing, SFT answers, DPO makes answers short and polite without making them wrong."""
    rows = []
    base, sft = (world_metrics(jaxpost.load(f"embedded:{name}")) for name in ("base", "sft"))
    rows.append(
        ("base: held-out questions answered right", "-", base["correct"], "at most 0.05", base["correct"] <= 0.05)
    )
    rows.append(
        ("SFT: held-out questions answered right", "-", sft["correct"], "at least 0.85", sft["correct"] >= 0.85)
    )
    for seed in SEEDS:
        began = time.process_time()
        run = train("dpo", seed)
        seconds = f"seed {seed}, {time.process_time() - began:.0f} CPU seconds"
        after, first = world_metrics(run), run.metrics["loss"][0, 1]
        overall, equal = pair_accuracies(run)
        rows += [
            ("DPO: first loss", seconds, first, "ln 2 to 1e-5", abs(first - np.log(2)) <= 1e-5),
            ("DPO: accuracy on held-out pairs", seconds, overall, "at least 0.9", overall >= 0.9),
            ("DPO: accuracy where both are equally long", seconds, equal, "at least 0.85", equal >= 0.85),
            (
                "DPO: words of an answer",
                seconds,
                after["words"],
                f"below SFT's {sft['words']:.2f}",
                after["words"] < sft["words"],
            ),
            (
                "DPO: polite answers",
                seconds,
                after["polite"],
                f"above SFT's {sft['polite']:.3f}",
                after["polite"] > sft["polite"],
            ),
            (
                "DPO: right answers",
                seconds,
                after["correct"],
                f"SFT's {sft['correct']:.3f} - 0.03",
                after["correct"] >= sft["correct"] - 0.03,
            ),
        ]
    return rows


def real_input() -> list[tuple]:
    """A pretrained 260 K Llama on hh-rlhf: 100 steps of DPO."""
    model, pairs = SHARED / "models" / "stories260K", SHARED / "data" / "hh_rlhf" / "pairs.jsonl.gz"
    rows = []
    for seed in SEEDS:
        began = time.perf_counter()
        run = train(
            "dpo", seed, model=str(model), train=str(pairs), rows_per_step=8, tokens_per_row=1024, learning_rate=3e-4,
            max_dropped=0.3,  # so many dialogues are longer than the 512 tokens of the model
        )  # fmt: skip
        seconds = f"seed {seed}, {time.perf_counter() - began:.0f} s"
        loss, accuracy = run.metrics["loss"], run.metrics["rewards/accuracies"]
        final = {name: values[-1, 1] for name, values in run.metrics.items() if name.startswith("eval/rewards/acc")}
        interval = f"[{final['eval/rewards/accuracies_low']:.3f}, {final['eval/rewards/accuracies_high']:.3f}]"
        late = accuracy[-25:, 1].mean()
        rows += [
            ("first loss", seconds, loss[0, 1], "ln 2 to 1e-5", abs(loss[0, 1] - np.log(2)) <= 1e-5),
            ("training accuracy, mean of the last 25 of 100 steps", seconds, late, "above 0.6", late > 0.6),
            (f"accuracy on 200 held-out pairs {interval}", seconds, final["eval/rewards/accuracies"], "reported", True),
        ]
    return rows


def demo_files() -> list[tuple]:
    """A pretrained 260 K Llama on LLaMA-Factory's demonstrations; 62 of 300 pairs, 127 of 300 answers fit it."""
    rows = []
    for stage, held_out, first in (("dpo", 12, np.log(2)), ("kto", 24, 0.5)):
        config = jaxpost.get_config(stage)
        config.model.path = str(SHARED / "models" / "stories260K")
        config.data.train = str(SHARED / "data" / "llamafactory_demo" / f"{stage}_en_demo.json")
        # Its vocabulary of 512 makes 3 to 4 times the tokens of others: most answers are longer than the model reads.
        config.data.update(
            {"on_long": "truncate", "max_dropped": 0.9, "allow": ("completion_lost",), "eval_examples": held_out}
        )
        config.batch.tokens_per_row = 1024
        config.loss.beta = 0.1  # rewards are sums over hundreds of tokens: at 1 they saturate
        config.run.update({"steps": 30, "dir": tempfile.mkdtemp() + "/run", "eval_prompts": 0, "export": False})
        run = jaxpost.run(config)
        loss, skipped = run.metrics["loss"][:, 1], run.metrics["skipped_steps"][-1, 1]
        how, late = f"{stage}_en_demo.json, seed 0", loss[-10:].mean()
        sound = skipped == 0 and bool(np.isfinite(loss).all())
        rows += [
            (f"{stage}: first loss", how, loss[0], f"{first:.4f} to 1e-4", abs(loss[0] - first) <= 1e-4),
            (f"{stage}: loss, mean of the last 10 of 30 steps", how, late, "below the first", late < loss[0]),
            (f"{stage}: steps that were skipped as not finite", how, skipped, "0", sound),
        ]
        for name, values in run.metrics.items():
            if name.startswith(("eval/loss", "eval/rewards/", "eval/kl")):
                rows.append((f"{stage}: {name}, {held_out} held out", how, values[-1, 1], "reported", True))
    return rows


# How each is run: the config, and what is set beside it. DPO itself is measured by `embedded`.
METHODS = {
    "IPO": ("dpo", {"name": "ipo", "beta": 0.5}),
    "APO-zero": ("dpo", {"name": "apo_zero", "beta": 1.0}),
    "SimPO": ("simpo", {}),
    "ORPO": ("orpo", {}),
    "KTO": ("kto", {}),
}
MOST_CPU_SECONDS = 240  # two minutes of two cores


def preference_methods() -> list[tuple]:
    """Relatives of DPO on the embedded world, 40 steps each, as their configs have it or with the settings named."""
    rows = []
    for name, (stage, loss) in METHODS.items():
        config = jaxpost.get_config(stage)
        config.loss.update(loss)
        config.run.update({"steps": 40, "dir": tempfile.mkdtemp() + "/run", "eval_prompts": 0, "export": False})
        began = time.process_time()
        run = jaxpost.run(config)
        seconds = time.process_time() - began
        given = " ".join(f"loss.{key}={value}" for key, value in loss.items())
        how = f"`--config={stage}` {given}".strip() + f", seed {config.run.seed}"
        accuracy = pair_accuracies(run)[0] if stage == "kto" else run.metrics["eval/rewards/accuracies"][-1, 1]
        rows += [
            (f"{name}: accuracy on held-out pairs", how, accuracy, "at least 0.85", accuracy >= 0.85),
            (
                f"{name}: CPU seconds of all cores",
                how,
                seconds,
                f"at most {MOST_CPU_SECONDS}",
                seconds <= MOST_CPU_SECONDS,
            ),
        ]
    return rows


def world_metrics(loaded) -> dict[str, float]:
    """The world's own rule on greedy answers to the held-out questions."""
    return embedded.evaluate(lambda asked: loaded.answer([[{"role": "user", "content": q}] for q in asked], 48))


def pair_accuracies(run) -> tuple[float, float]:
    """Share of held-out pairs whose implicit reward is higher for the chosen: of all, of those equally long."""
    config = configs.resolve(jaxpost.get_config("dpo"))
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    documents = open_data(config, model, "preference").eval
    score = lambda params: compute_logps(documents, config, model.policy, params, mesh, 1024)  # noqa: E731
    policy, reference = score(run.params), score(model.load())
    margins, equal = [], []
    for index in range(len(documents)):
        chosen, rejected = (p.sum() - r.sum() for p, r in zip(policy[index], reference[index], strict=True))
        margins.append(chosen - rejected)
        equal.append(len(set(map(len, documents[index].completions))) == 1)
    right = np.array(margins) > 0
    return float(right.mean()), float(right[np.array(equal)].mean())
