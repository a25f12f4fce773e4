"""SFT of Qwen3-30B-A3B, its 128 experts over eight chips.

Command:    jaxpost plan --config=configs/plans/qwen3_30b_a3b_sft.py --topology=v5p:2x2x4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"
    config.model = ConfigDict({"path": "shape:qwen3-30b-a3b"})
    config.data = ConfigDict({"train": "conversations.jsonl", "eval_examples": 0})
    config.batch = ConfigDict({"rows_per_step": 16, "tokens_per_row": 4096, "documents_per_row": 32})
    config.mesh = ConfigDict({"fsdp": 2, "expert": 8})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
