"""SFT of Llama-3.1-8B, 16 rows a step of 2,048 tokens. Weights and moments in bfloat16.

Command:      jaxpost plan --config=configs/plans/llama3_8b_sft.py --topology=v5e:4x4
Long rows:    the same with --config.batch.tokens_per_row=32768 --config.mesh.context=4 --config.batch.rows_per_step=4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"
    config.model = ConfigDict({"path": "shape:llama-3.1-8b"})
    config.data = ConfigDict({"train": "conversations.jsonl", "eval_examples": 0})
    config.batch = ConfigDict({"rows_per_step": 16, "tokens_per_row": 2048, "documents_per_row": 32})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
