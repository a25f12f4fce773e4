"""DPO of Llama-3.1-70B, 32 pairs a step of up to 2,048 tokens each, reference read in every step.

Command:    jaxpost plan --config=configs/plans/llama3_70b_dpo.py --topology=v5p:2x4x4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "dpo"
    config.model = ConfigDict({"path": "shape:llama-3.1-70b"})
    config.data = ConfigDict({"train": "pairs.jsonl", "eval_examples": 0})
    config.reference = ConfigDict({"mode": "live"})
    config.batch = ConfigDict({"rows_per_step": 32, "tokens_per_row": 4096, "documents_per_row": 8})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
