"""PPO in the embedded world: what the learned reward does to the world's own rule, and a reward with a planted flaw."""

import tempfile
import time

import jaxpost
from tests.claims.runs import SEEDS

MOST_SECONDS = 300  # of 2 cores
FLAW = 0.3  # points that the flawed reward gives for a word


def words(question, answer, record) -> float:
    """The flaw: the longer, the better."""
    return float(len(answer.split()))


def embedded_ppo() -> list[tuple]:
    """PPO from the embedded reward model (configs/ppo.py), three seeds.

    Gold is the world's own rule, by which the reward model's comparisons were made and which PPO never sees; the
    distance left to its maximum, 1, is that of the first completions of held-out questions, sampled as in training.
    Flawed: the KL coefficient at 0, and a reward that pays for every word besides; the rules that end it are those of
    configs/ppo.py, which end no honest run. Gold over a run is that of the training prompts.
    """
    rows = []
    for seed in SEEDS:
        began = time.process_time()
        run = jaxpost.run(settings(seed))
        seconds, how = time.process_time() - began, f"`--config=ppo`, seed {seed}"
        before, after = run.metrics["eval/gold"][[0, -1], 1]
        kl, gained = run.metrics["kl"][:, 1].max(), (after - before) / (1 - before)
        rows += [
            (
                f"gold of held-out prompts: {before:.3f} before, {after:.3f} after; share of the distance to 1",
                how,
                gained,
                "at least 0.5",
                gained >= 0.5,
            ),
            ("largest KL of a step, nats a completion", how, kl, "at most 20, the bound", kl <= 20),
            ("CPU seconds of both cores", how, seconds, f"at most {2 * MOST_SECONDS}", seconds <= 2 * MOST_SECONDS),
            ("halted by the rules", how, float(run.halted is not None), "0", run.halted is None),
        ]
        rows += hacked(seed, rise(run))
    return rows


def hacked(seed: int, honest: float) -> list[tuple]:
    """A run whose reward has a flaw. honest: by how much the reward rose in the run without."""
    config = settings(seed, **{"kl.coef": 0.0})
    config.score.reward = [config.score.reward, "tests.claims.ppo:words"]
    config.score.weights = [1.0, FLAW]
    run = jaxpost.run(config)
    how = f"`--config=ppo --config.kl.coef=0`, {FLAW} points a word, seed {seed}"
    gold, risen = run.metrics["gold"][:, 1], rise(run)
    kept = gold[-1] / gold[0]
    return [
        (
            f"flawed: halted at step {len(gold)} ({run.halted})",
            how,
            float(run.halted is not None),
            "1",
            run.halted is not None,
        ),
        (f"flawed: rise of the proxy, {honest:.3f} in the honest run", how, risen, "at least as much", risen >= honest),
        (f"flawed: gold at the halt over gold at the start ({gold[0]:.3f})", how, kept, "at least 0.9", kept >= 0.9),
    ]


def settings(seed: int, **changes):
    config = jaxpost.get_config("ppo")
    config.update_from_flattened_dict(changes)
    config.run.seed, config.run.dir, config.run.eval_prompts = seed, tempfile.mkdtemp() + "/run", 0
    config.run.export = False
    return config


def rise(run) -> float:
    """Of the reward that is trained on: its highest over its first step."""
    reward = run.metrics["reward"][:, 1]
    return float(reward.max() - reward[0])
