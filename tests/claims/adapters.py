"""DPO of the embedded world by adapters, over weights held in f32 and in fewer bits."""

import tempfile
import time

import jaxpost

RATE = 1e-3  # of adapters; ten times what all weights take
RUNS = {"all weights": {}, "LoRA": {"rank": 8}, "DoRA": {"rank": 8, "dora": True}}
RUNS |= {f"LoRA over {kind}": {"rank": 8, "quantize": kind} for kind in ("int8", "nf4")}


def adapters() -> list[tuple]:
    """Adapters of rank 8 on all products, one seed: the accuracy on held-out pairs beside that of all weights."""
    rows, first = [], None
    for name, settings in RUNS.items():
        config = jaxpost.get_config("dpo")
        config.lora, config.run.eval_prompts, config.run.dir = settings, 0, tempfile.mkdtemp() + "/run"
        config.optimizer.learning_rate = RATE if settings else config.optimizer.learning_rate
        began = time.perf_counter()
        run = jaxpost.run(config)
        how = f"seed 0, {time.perf_counter() - began:.0f} s"
        accuracy = run.metrics["eval/rewards/accuracies"][-1, 1]
        first = accuracy if first is None else first
        claim, held = f"within 0.02 of {first:.4f}", abs(accuracy - first) <= 0.02
        rows.append((f"{name}: accuracy on held-out pairs", how, accuracy, claim, held))
    return rows
