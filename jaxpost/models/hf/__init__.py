"""Checkpoints in the layout of Hugging Face, in and out.

A family is one file here (`llama.py`): how its config.json reads, how it is written, and its name map.
"""

from jaxpost.models.hf.config import read_config
from jaxpost.models.hf.hub import resolve
from jaxpost.models.hf.load import fingerprint, load_params
from jaxpost.models.hf.merge import merge
from jaxpost.models.hf.peft import CONFIG as ADAPTER_CONFIG
from jaxpost.models.hf.peft import WEIGHTS as ADAPTER_WEIGHTS
from jaxpost.models.hf.peft import export_adapter, is_adapter, load_adapter, read_adapter
from jaxpost.models.hf.save import export

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "export",
    "export_adapter",
    "fingerprint",
    "is_adapter",
    "load_adapter",
    "load_params",
    "merge",
    "read_adapter",
    "read_config",
    "resolve",
]
