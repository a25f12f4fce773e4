"""config.json, read key by key: every error names the file and the key."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxpost.errors import CheckpointError
from jaxpost.ops.rope import Rope

_MISSING = object()
_ROPE_FIELDS = {  # key of config.json -> field of Rope
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}
_ROPE_KINDS = {"default": (), "linear": ("factor",), "llama3": tuple(_ROPE_FIELDS)}


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is missing, broken or not an object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder holds config.json and *.safetensors") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


class Keys:
    """The values of one config.json."""

    def __init__(self, path: epath.Path, values: dict[str, Any], prefix: str = ""):
        self.path = path
        self.values = values
        self.prefix = prefix  # of the keys in errors: "rope_scaling."

    def error(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{key}: {reason}")

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive integer; an absent or null key is the default."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, f"{value!r} is not a positive integer")
        return value

    def count(self, key: str, default: int) -> int:
        """An integer of at least 0."""
        value = self._get(key, default)
        if type(value) is not int or value < 0:
            raise self.error(key, f"{value!r} is not a count")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(key, f"{value!r} is not a positive number")
        return value

    def weight(self, key: str, default: float) -> float:
        """A number of at least 0."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not value >= 0:
            raise self.error(key, f"{value!r} is not a number of at least 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"{value!r} is neither true nor false")
        return value

    def optional(self, key: str, read: Callable[[str], Any], default: Any) -> Any:
        """Where null means "without": `default` for an absent key, None for null, else `read(key)`."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else read(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise self.error(key, f"{value!r} is not a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    def token_id(self, key: str) -> int | None:
        return next(iter(self.token_ids(key)), None)

    def require(self, key: str, *allowed: Any) -> None:
        """Refuses a feature that the decoder does not have, rather than approximate it. Absent or null passes."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.error(key, f"{value!r} is not supported; supported: {', '.join(map(repr, allowed)) or 'absent'}")

    def inside(self, key: str) -> "Keys":
        """The values of the object under a key; none where it is absent or null."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.error(key, f"{values!r} is not an object")
        return Keys(self.path, values or {}, f"{self.prefix}{key}.")

    def rope(self, theta: float = 10_000.0) -> Rope:
        """`rope_parameters` of newer files, or `rope_theta` (by default `theta`) and `rope_scaling` of older ones."""
        theta = self.number("rope_theta", theta)
        newer = self.values.get("rope_parameters") is not None
        return self.inside("rope_parameters" if newer else "rope_scaling").rope_parameters(theta)

    def rope_parameters(self, theta: float) -> Rope:
        """These values as those of one RoPE."""
        kind = self.values.get("rope_type", self.values.get("type", "default"))
        if kind not in _ROPE_KINDS:
            raise self.error("rope_type", f"{kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}")
        for name in sorted(self.values.keys() - {"rope_type", "type", "rope_theta", *_ROPE_FIELDS}):
            raise self.error(name, f"is not supported (rope_type {kind!r})")
        fields = {_ROPE_FIELDS[name]: self.number(name) for name in _ROPE_KINDS[kind]}
        return Rope(self.number("rope_theta", theta), kind, **fields)

    def _get(self, key, default):
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(key, "is missing")
        return default


def rope_keys(rope: Rope, max_positions: int) -> dict[str, Any]:
    """The spelling of config.json that every version of transformers reads."""
    scaling = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind}
        scaling |= {name: getattr(rope, _ROPE_FIELDS[name]) for name in _ROPE_KINDS[rope.kind]}
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "max_position_embeddings": max_positions}
