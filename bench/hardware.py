"""docs/hardware.md: the smallest slice of each TPU generation that a stage of a published model fits on.

    python bench/hardware.py > docs/hardware.md

Counted from shapes (plan/ledger.py), in a minute; the plans of configs/plans are compiled as well, by `jaxpost plan`.
"""

import dataclasses

from jaxpost import config as configs
from jaxpost.errors import ConfigError
from jaxpost.plan import chips, planner

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "gemma-3-4b", "gemma-3-27b")
CHIPS = ("v5e", "v6e", "v5p")
MARGIN = 1.08  # of what is counted, for what the compiler adds
TOKENS, EXPERTS = 4096, 8
STAGES = {
    "SFT": {"stage": "sft"},
    "LoRA": {"stage": "sft", "lora": {"rank": 16}},
    "reward model": {"stage": "reward"},
    "DPO": {"stage": "dpo", "reference": {"mode": "live"}},
    "PPO": {
        "stage": "ppo",
        "score": {"reward": "SHAPE"},
        "rollout": {"prompts_per_step": 64, "completions_per_prompt": 4, "max_prompt_tokens": 512},
        "sampling": {"max_new_tokens": 512, "slots": 128, "prefill_tokens": 512},
        "ppo": {"epochs": 1, "minibatches": 4},
    },
}
HEAD = f"""# How much hardware a run needs

Made by `python bench/hardware.py`: the smallest slice on which a stage fits, GiB of a device that it needs there, and
tokens a second that the chips' published figures allow at most (a real run is slower). Counted from shapes
(`jaxpost/plan/ledger.py`), with {MARGIN - 1:.0%} to spare; `jaxpost plan --config=... --topology=...` compiles the same
and is what to trust before renting.

Settings: one row of {TOKENS:,} tokens a device, weights and moments in bfloat16, `remat.policy=full`, weights over
`mesh.fsdp` (Qwen3-30B-A3B: experts over `mesh.expert={EXPERTS}`). With float32 weights and moments (`precision.*`)
parameters, moments and gradients take twice as much. DPO reads its reference in every step; with
`reference.mode=cached`, the default, it needs what SFT needs. LoRA: rank 16 on all products that adapters reach. PPO:
64 prompts of at most 512 tokens, 4 completions each of at most 512; a value model and a reward model of the policy's
size and a reference, all on the devices; its time hangs on the layout in which it draws
([performance.md](performance.md)) and is not given.
"""


def config_of(model: str, values: dict, devices: int):
    """The settings above, on so many devices."""
    shape = f"shape:{model}"
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
    if "score" in values:
        values["score"] = {"reward": shape}
    mesh = {"fsdp": devices}
    if model == "qwen3-30b-a3b":
        if "lora" in values:
            values["lora"]["targets"] = ("attn/",)  # adapters do not reach experts
        mesh = {"fsdp": devices // EXPERTS, "expert": EXPERTS} if devices % EXPERTS == 0 else None
    if mesh is None:
        return None
    common = {
        "model": {"path": shape},
        "data": {"train": "data.jsonl", "eval_examples": 0},
        "batch": {"rows_per_step": devices, "tokens_per_row": TOKENS, "documents_per_row": 8},
        "mesh": mesh,
        "precision": {"params": "bfloat16", "moments": "bfloat16"},
        "remat": {"policy": "full"},
        "run": {"steps": 1000},
    }
    return configs.resolve(common | values)


def smallest(model: str, values: dict, chip: str):
    """(topology, its plan) of the smallest slice that fits; None where none does up to 256 chips."""
    for layout in chips.slices_of(chip):
        topology = f"{chip}:{layout}"
        _, devices = chips.describe(topology)
        if devices > 256:
            return None
        try:
            config = config_of(model, values, devices)
            found = config and planner.estimate(dataclasses.replace(config), topology)
        except ConfigError:  # a dimension that does not divide by so many
            continue
        if found and found.peak * MARGIN <= found.usable:
            return topology, found
    return None


def main() -> None:
    print(HEAD)
    for model in MODELS:
        print(f"## {model}\n\n| | {' | '.join(CHIPS)} |\n|---|{'---|' * len(CHIPS)}")
        for stage, values in STAGES.items():
            cells = []
            for chip in CHIPS:
                found = smallest(model, values, chip)
                cells.append("more than 256 chips" if found is None else cell(*found))
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)
        print()


def cell(topology: str, plan) -> str:
    rate = f", {plan.tokens_per_second:,.0f}/s" if len(plan.programs) == 1 else ""
    return f"{topology.split(':')[1]}, {plan.peak / planner.GIB:.1f} GiB{rate}"


if __name__ == "__main__":
    main()
