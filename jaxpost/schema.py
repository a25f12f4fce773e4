"""Frozen dataclasses as a schema: nested dicts are checked against their fields and converted, once.

A field made by `key` carries its meaning and range, its annotation the type. Every function takes the dataclass `cls`,
whose fields are keys or sections (dataclasses of their own). Whatever is wrong raises a ConfigError whose one line
begins with the dotted key.
"""

import ast
import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jaxpost.errors import ConfigError

# ((path, amount), ...), an amount a weight or {"tokens": n}; given as a path, or a list of paths, of [path, weight]
# pairs and of {"path": ..., "weight": ...} or {"path": ..., "tokens": ...}
Sources = tuple[tuple[str, float | dict[str, int]], ...]
Scalar = int | float | bool | str | None
NO_LIMITS = types.MappingProxyType({})


def key(doc: str, default: Any = dataclasses.MISSING, **limits: float):
    """A key: its meaning with unit, its default (none: must be set), its range low <= x <= high, above < x < below."""
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


def free_keys(doc: str):
    """The field that gathers, in a dict, the scalars under names the section does not list."""
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "free": True})


def keys(cls, prefix: str = "") -> dict[str, dataclasses.Field]:
    """{dotted key: field} of all keys but the free ones."""
    found = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= keys(field.type, f"{prefix}{field.name}.")
        elif not field.metadata.get("free"):
            found[prefix + field.name] = field
    return found


def free_sections(cls) -> dict[str, dataclasses.Field]:
    """{section that accepts names it does not list: the field that gathers them}."""
    sections = [f for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)]
    return {s.name: f for s in sections for f in dataclasses.fields(s.type) if f.metadata.get("free")}


def describe(cls) -> list[tuple[str, str, str]]:
    """(key, default, meaning with range) of every key."""
    rows = []
    for name, field in keys(cls).items():
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        choices = _choices(field.type)
        limits = "|".join(choices) if choices else _range(field.metadata, "x")
        rows.append((name, default, field.metadata["doc"] + (f" [{limits}]" if limits else "")))
    return rows + [(f"{section}.*", "", field.metadata["doc"]) for section, field in free_sections(cls).items()]


def to_dict(config) -> dict:
    """Dataclass, ConfigDict or dict -> plain nested dict, free keys back in their place."""
    if dataclasses.is_dataclass(config):
        out = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.metadata.get("free"):
                out.update(value)
            else:
                out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
        return out
    if hasattr(config, "to_dict"):  # ConfigDict: field references are resolved on the way
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected a ConfigDict or dict, got {type(config).__name__}")
    return {k: to_dict(v) if isinstance(v, Mapping) or hasattr(v, "to_dict") else v for k, v in config.items()}


def read(annotation, text: str):
    """Text of a command line as a value of the annotated type; what does not parse stays text."""
    plain = text.strip()
    options = typing.get_args(annotation)
    if plain in ("None", "none") and types.NoneType in options:
        return None
    listed = plain[:1] in ("[", "(", "{")
    is_text = annotation in (str, str | None) or typing.get_origin(annotation) is Literal
    if is_text or (annotation in (Sources, Sources | None) and not listed):
        return text
    if plain in ("true", "false"):
        return plain == "true"
    try:
        return ast.literal_eval(plain)
    except (ValueError, SyntaxError, TypeError):
        return text


def convert(cls, values, prefix: str = "", root=None):
    """The dataclass `cls` from a nested dict. `prefix` is "" or "section.", `root` the dataclass of the whole."""
    root = root or cls
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]}: expected a section of keys, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("free")}
    free = [f.name for f in dataclasses.fields(cls) if f.metadata.get("free")]
    extra = {name: value for name, value in values.items() if name not in fields}
    if extra and not free:
        name = next(iter(extra))
        raise ConfigError(f"{prefix}{name}: {unknown(root, f'{prefix}{name}')}")
    made = {name: {k: _scalar(f"{prefix}{k}", v) for k, v in extra.items()} for name in free}
    for name, field in fields.items():
        if dataclasses.is_dataclass(field.type):
            made[name] = convert(field.type, values.get(name, {}), f"{prefix}{name}.", root)
        elif name in values:
            made[name] = _value(prefix + name, field.type, values[name], field.metadata)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: missing; {field.metadata['doc']}")
    return cls(**made)


def unknown(cls, name: str) -> str:
    """What to say of a dotted key that `cls` has not: the nearest one, or those of its section."""
    section, _, leaf = name.rpartition(".")
    known = [*keys(cls), *(f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type))]
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]  # right name, wrong or misspelt section
    near = difflib.get_close_matches(name, elsewhere, 1, cutoff=0)
    near = near or [siblings[s] for s in difflib.get_close_matches(leaf, siblings, 1)]
    if near:
        return f"unknown key; did you mean {near[0]}?"
    names = siblings or {k.partition(".")[0]: None for k in known}
    return f"unknown key; there are {', '.join(names)}"


def _value(name: str, annotation, value, limits: Mapping = NO_LIMITS):
    """`value` as the annotated type, or a ConfigError that says what was expected."""
    options = typing.get_args(annotation)
    if types.NoneType in options:
        if value is None:
            return None
        (annotation,) = (a for a in options if a is not types.NoneType)
    if annotation == Sources:
        return _sources(name, value)
    if typing.get_origin(annotation) is tuple:
        return _tuple(name, annotation, value, limits)
    if typing.get_origin(annotation) is Literal:
        if isinstance(value, str) and value in typing.get_args(annotation):
            return value
        raise ConfigError(f"{name}: expected one of {', '.join(_choices(annotation))}, got {value!r}")
    # type(), not isinstance: True is an int to Python, not to a user. A float key takes an int.
    if type(value) is not annotation and not (annotation is float and type(value) is int):
        word = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}[annotation]
        raise ConfigError(f"{name}: expected {word}, got {value!r}")
    if annotation is float and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value!r}")
    if not _inside(value, limits):
        raise ConfigError(f"{name}: {value!r} is out of range; expected {_range(limits, name.rpartition('.')[2])}")
    return annotation(value)


def _tuple(name: str, annotation, value, limits: Mapping) -> tuple:
    inner = typing.get_args(annotation)
    many = inner[-1] is Ellipsis
    if many and isinstance(value, str):  # one pattern may stand without brackets
        value = (value,)
    if not isinstance(value, list | tuple) or (not many and len(value) != len(inner)):
        raise ConfigError(f"{name}: expected {'a list' if many else f'{len(inner)} values'}, got {value!r}")
    return tuple(_value(name, inner[0], item, limits) for item in value)


def _sources(name: str, value) -> Sources:
    if isinstance(value, str) or _is_mapping(value):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name}: expected a path or a list of paths or [path, weight] pairs, got {value!r}")
    return tuple(_source(name, item) for item in value)


def _source(name: str, item) -> tuple[str, float | dict[str, int]]:
    """One of `Sources`, from any of the forms it may be given in."""
    path, amount = item if isinstance(item, list | tuple) and len(item) == 2 else (item, 1.0)
    if _is_mapping(item):
        given = to_dict(item)
        path = given.pop("path", None)
        if len(given) > 1 or not given.keys() <= {"weight", "tokens"}:
            raise ConfigError(f"{name}: expected the keys path and weight, or path and tokens, got {item!r}")
        amount = given.pop("weight", given or 1.0)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{name}: expected a path or a [path, weight] pair, got {item!r}")
    if _is_mapping(amount):
        given = to_dict(amount)
        if given.keys() != {"tokens"}:
            raise ConfigError(f"{name}: expected a weight or a number of tokens for {path}, got {amount!r}")
        if type(given["tokens"]) is not int or given["tokens"] < 1:
            raise ConfigError(f"{name}: tokens of {path}: expected a whole number from 1, got {given['tokens']!r}")
        return path, given
    return path, _value(name, float, amount, {"above": 0})


def _is_mapping(value) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "to_dict")  # ConfigDict is no Mapping


def _scalar(name: str, value) -> Scalar:
    if not name.rpartition(".")[2].isidentifier():
        raise ConfigError(f"{name}: not the name of a keyword argument")
    if value is not None and type(value) not in (int, float, bool, str):
        raise ConfigError(f"{name}: expected a number, True, False, a string or None, got {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value!r}")
    return value


def _inside(value, limits: Mapping) -> bool:
    return not (
        ("low" in limits and value < limits["low"])
        or ("high" in limits and value > limits["high"])
        or ("above" in limits and value <= limits["above"])
        or ("below" in limits and value >= limits["below"])
    )


def _range(limits: Mapping, name: str) -> str:
    """`0 <= b1 < 1`, or nothing where there are no limits."""
    low = f"{limits['low']} <= " if "low" in limits else f"{limits['above']} < " if "above" in limits else ""
    high = f" <= {limits['high']}" if "high" in limits else f" < {limits['below']}" if "below" in limits else ""
    return low + name + high if low or high else ""


def _choices(annotation) -> tuple[str, ...]:
    """The words that a key accepts, itself or as items of its list."""
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def imported(name: str, path: str):
    """What the dotted path `pkg.mod:fn` under the key `name` stands for. Raises ConfigError."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}: cannot import {path!r} ({error}); wanted pkg.mod:fn") from error
