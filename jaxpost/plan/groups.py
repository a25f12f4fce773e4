"""Which axes of the mesh a collective runs over: groups of devices as HLO writes them, set against the mesh."""

import functools
import itertools
import math
import re

import numpy as np

UNKNOWN = ("?",)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? ?\{([^}]*)\}")
_REFERENCE = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")
_TURNED = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_LISTS = re.compile(r"\{([\d,]*)\}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(match: re.Match) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(match[2]))).reshape(_numbers(match[2]))
    if match[3]:
        ids = ids.transpose(_numbers(match[3]))
    return ids.reshape(_numbers(match[1]))


def _of_mesh(match: re.Match) -> np.ndarray:
    """`mesh['a'=4,'b'=2] {'b'}`, with `, device_ids=([2,4]T(1,0))` or (0,2,1,3) and parts of an axis, `'a':(1)2`."""
    sizes = {name.strip(" '"): int(size) for name, size in (axis.split("=") for axis in match[1].split(","))}
    shape = list(sizes.values())
    ids = np.arange(math.prod(shape))
    if match[2]:
        turned = _TURNED.fullmatch(match[2])
        listed = _numbers(turned[1] if turned else match[2])
        ids = ids.reshape(listed).transpose(_numbers(turned[2])) if turned else np.array(listed)
    dims, chosen = [], []  # every axis as (before, the part, after)
    references = {name: (int(pre or 1), int(size or sizes[name])) for name, pre, size in _REFERENCE.findall(match[3])}
    for name, size in sizes.items():
        pre, part = references.get(name, (1, 1))
        chosen += [len(dims) + 1] if name in references else []
        dims += [pre, part, size // (pre * part)]
    rest = [axis for axis in range(len(dims)) if axis not in chosen]
    group = math.prod(dims[axis] for axis in chosen)
    return ids.reshape(dims).transpose(rest + chosen).reshape(-1, group)


def parse_groups(text: str, devices: int) -> list[list[int]] | None:
    """Groups of device numbers from what follows `replica_groups=`; `{}` is one group of all; None: not understood.

    >>> parse_groups("{{0,2},{1,3}}, use_global_device_ids=true", 4)
    [[0, 2], [1, 3]]
    >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    >>> parse_groups("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", 4)
    [[0, 2], [1, 3]]
    """
    if text.startswith("{}"):
        return [list(range(devices))]
    if text.startswith("{{"):
        return [_numbers(group) for group in _LISTS.findall(text[1 : text.index("}}") + 1])]
    if match := _IOTA.match(text):
        return _iota(match).tolist()
    if match := _MESH.match(text):
        return _of_mesh(match).tolist()
    return None


class Axes:
    """Names the axes of a mesh (`{name: size}`, devices row-major) that groups of devices run over.

    partitions: devices that the groups count. Fewer than the mesh has: the program is one slice's, its groups count
    that slice's devices, and the mesh's first axes (`across`) are what lies between slices.
    """

    def __init__(self, mesh_shape: dict[str, int], partitions: int):
        total = math.prod(mesh_shape.values())
        self.slices = total // partitions if partitions and total % partitions == 0 else 1
        local, left, across = dict(mesh_shape), self.slices, []
        for name in mesh_shape:
            shared = math.gcd(local[name], left)
            if left > 1 and shared > 1:
                local[name], left = local[name] // shared, left // shared
                across.append(name)
        self.across = tuple(across)
        self.devices = total // self.slices
        self.names = [name for name, size in local.items() if size > 1]
        self._sizes = local
        shape = [local[name] for name in self.names]
        self._places = np.indices(shape).reshape(len(shape), math.prod(shape))  # [axes, devices]
        self.of_groups, self.of_pairs = functools.cache(self._of_groups), functools.cache(self._of_pairs)

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along axes, within a slice."""
        return math.prod(self._sizes.get(name, 1) for name in axes)

    def _of_groups(self, text: str) -> tuple[tuple[str, ...], int]:
        """(axes, devices in a group) of what follows `replica_groups=`; all devices where it is not understood."""
        groups = parse_groups(text, self.devices)
        if not groups or max(itertools.chain(*groups)) >= self.devices:
            return UNKNOWN, max(map(len, groups)) if groups else self.devices
        return self._over([(group[0], device) for group in groups for device in group]), max(map(len, groups))

    def _of_pairs(self, text: str) -> tuple[str, ...]:
        """Axes along which the devices of `{{source,target},...}` differ; () where all stay where they are."""
        pairs = [tuple(_numbers(pair)) for pair in _LISTS.findall(text)]
        if not pairs or max(itertools.chain(*pairs)) >= self.devices:
            return UNKNOWN
        return self._over(pairs)

    def _over(self, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
        """The axes in whose coordinate any pair differs."""
        first, second = np.array(pairs).T
        differs = (self._places[:, first] != self._places[:, second]).any(axis=1)
        return tuple(name for name, one in zip(self.names, differs, strict=True) if one)
