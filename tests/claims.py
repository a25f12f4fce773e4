"""What learns takes minutes and several seeds: `make claims`, or `python -m tests.claims [embedded] [real]`.

Each claim trains, measures, and is written to docs/claims/NAME.md with seed, time and command, whether it held or
not. Exits 1 if one did not hold.
"""

import pathlib
import sys
import tempfile
import time

import numpy as np

import jaxpost
from jaxpost import config as configs
from jaxpost import embedded
from jaxpost.train.reference import compute_logps
from jaxpost.train.setup import open_data, open_mesh, open_model
from tests.shared import SHARED

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "claims"
SEEDS = (0, 1, 2)


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
        began = time.perf_counter()
        run = train("dpo", seed)
        seconds = f"seed {seed}, {time.perf_counter() - began:.0f} s"
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


def train(stage: str, seed: int, *, model=None, train=None, learning_rate=None, max_dropped=0.05, **batch):
    """One run of a packaged config with a seed of its own, in a folder that is thrown away."""
    config = jaxpost.get_config(stage)
    config.run.seed, config.run.dir = seed, tempfile.mkdtemp() + "/run"
    config.run.eval_prompts = 0
    config.model.path, config.data.train = model or config.model.path, train or config.data.train
    config.optimizer.learning_rate = learning_rate or config.optimizer.learning_rate
    config.data.max_dropped = max_dropped
    config.batch.update(batch)
    return jaxpost.run(config)


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


CLAIMS = {"embedded": embedded_world, "real": real_input}


def write(name: str, rows: list[tuple]) -> bool:
    """docs/claims/NAME.md; whether every claim held."""
    lines = [f"# {name}", "", CLAIMS[name].__doc__.strip(), "", f"`python -m tests.claims {name}`, 2 CPU cores", ""]
    lines += ["| what | run | measured | claimed | held |", "|---|---|---|---|---|"]
    lines += [
        f"| {what} | {how} | {value:.4f} | {claim} | {'yes' if held else '**no**'} |"
        for what, how, value, claim, held in rows
    ]
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return all(row[-1] for row in rows)


def main(names: list[str]) -> int:
    if unknown := set(names) - set(CLAIMS):
        sys.exit(f"unknown claims {sorted(unknown)}; there are {', '.join(CLAIMS)}")
    names = names or [name for name in CLAIMS if name != "real" or SHARED.is_dir()]
    return 0 if all([write(name, CLAIMS[name]()) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
