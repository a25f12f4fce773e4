"""LoRA of Gemma-3-27B on rows of 8,192 tokens.

Command:    jaxpost plan --config=configs/plans/gemma3_27b_lora.py --topology=v5e:4x8
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"
    config.model = ConfigDict({"path": "shape:gemma-3-27b"})
    config.lora = ConfigDict({"rank": 16})
    config.data = ConfigDict({"train": "conversations.jsonl", "eval_examples": 0})
    config.batch = ConfigDict({"rows_per_step": 32, "tokens_per_row": 8192, "documents_per_row": 32})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
