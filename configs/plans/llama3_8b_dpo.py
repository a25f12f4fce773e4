"""DPO of Llama-3.1-8B, 16 pairs a step of up to 2,048 tokens each, reference read in every step.

A row of 4,096 tokens holds a pair whose completions share nothing but the first token, the most that a pair of such
sequences can take; real pairs share their prompts, and more of them fit. Weights and moments in bfloat16.

Command:    jaxpost plan --config=configs/plans/llama3_8b_dpo.py --topology=v5e:4x4
f32 state:  the same with --config.precision.params=float32 --config.precision.moments=float32
To train:   the same keys with model.path and data.train of your own
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "dpo"
    config.model = ConfigDict({"path": "shape:llama-3.1-8b"})
    config.data = ConfigDict({"train": "pairs.jsonl", "eval_examples": 0})
    config.reference = ConfigDict({"mode": "live"})  # weights on the devices; "cached" needs none
    config.batch = ConfigDict({"rows_per_step": 16, "tokens_per_row": 4096, "documents_per_row": 8})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
