"""Models by hub name."""

import re

from etils import epath

from jaxpost.errors import CheckpointError

FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]


def resolve(path: str) -> str:
    """The folder of a model: `path` itself, or the local copy of a hub model ("org/name") that is downloaded first.

    Raises:
      CheckpointError: neither a folder nor a model on the hub, or the extra `hf` is not installed.
    """
    if epath.Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{path}: no such folder; to fetch it from the Hugging Face hub: pip install 'jaxpost[hf]'"
        ) from None
    try:
        return huggingface_hub.snapshot_download(path, allow_patterns=FILES)
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: neither a folder here nor to be had from the hub: {reason}") from None
