"""Checkpoints in the layout of Hugging Face, in and out.

A family is one file here (`llama.py`): how its config.json reads, how it is written, and its name map.
"""

from jaxpost.models.hf.config import read_config
from jaxpost.models.hf.hub import resolve
from jaxpost.models.hf.load import load_params
from jaxpost.models.hf.merge import merge
from jaxpost.models.hf.save import export

__all__ = ["export", "load_params", "merge", "read_config", "resolve"]
