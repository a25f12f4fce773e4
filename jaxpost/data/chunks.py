"""Chunks: the documents of some consecutive or chosen records of one source, in a few flat arrays.

A chunk is the unit of work of tokenising processes and of the cache on disk. Arrays have the narrowest type that holds
them: 3 bytes a token for a vocabulary below 65,536, 5 above.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpost.data.encode import encode
from jaxpost.data.formats import ExampleFault, detect
from jaxpost.data.questions import asks, read
from jaxpost.data.sources import Source
from jaxpost.data.templates import Template
from jaxpost.data.tokenizers import Tokenizer
from jaxpost.errors import DataError
from jaxpost.types import Document, Origin


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the records of one source become documents; can be pickled. `detected`: the format was read off the first
    record, and every other must have the keys of the same one."""

    format: str
    detected: bool
    kind: str
    template: Template
    tokenizer: Tokenizer
    max_tokens: int
    on_long: str
    row_tokens: int | None


class Fault(NamedTuple):
    """Why an example was dropped: an `ExampleFault` in plain values."""

    position: int  # of its record in the chunk
    reason: str
    detail: str
    path: str
    line: int

    def error(self) -> ExampleFault:
        return ExampleFault(self.reason, self.detail, Origin(self.path, self.line))


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """R records as D documents of P parts (a prompt and its completions, one after another) of T tokens.

    `values` are what documents carry by name, [T] for "token.NAME" and [P] for "completion.NAME", 0 at prompts.
    """

    tokens: np.ndarray  # [T]
    weights: np.ndarray  # [T]
    part_starts: np.ndarray  # [P + 1]
    first_parts: np.ndarray  # [D + 1]
    first_documents: np.ndarray  # [R + 1]
    truncated: np.ndarray  # bool[R]
    lines: np.ndarray  # [D]
    paths: np.ndarray  # [D], into path_names
    transforms: np.ndarray  # [D], into transform_names
    path_names: list[str]
    transform_names: list[str]
    faults: list[Fault]
    values: dict[str, np.ndarray]

    def document(self, index: int, example_id: int) -> Document:
        """One document; its arrays are int32 and f32."""
        first, end = map(int, self.first_parts[index : index + 2])
        starts = self.part_starts[first : end + 1].tolist()
        prompt, *completions = (slice(start, stop) for start, stop in itertools.pairwise(starts))
        by_token = {name[6:]: array for name, array in self.values.items() if name.startswith("token.")}
        by_part = {name[11:]: array for name, array in self.values.items() if name.startswith("completion.")}
        return Document(
            prompt=self.tokens[prompt].astype(np.int32),
            completions=tuple(self.tokens[part].astype(np.int32) for part in completions),
            weights=tuple(self.weights[part].astype(np.float32) for part in completions),
            example_id=example_id,
            origin=Origin(self.path_names[self.paths[index]], int(self.lines[index])),
            token={name: tuple(array[part] for part in completions) for name, array in by_token.items()},
            completion={name: tuple(array[first + 1 : end].tolist()) for name, array in by_part.items()},
            transform=self.transform_names[self.transforms[index]],
        )

    @functools.cached_property
    def costs(self) -> np.ndarray:
        """`Document.cost` of each, int64[D]."""
        starts, first = self.part_starts.astype(np.int64), self.first_parts.astype(np.int64)
        sizes, completions = np.diff(starts[first]), np.diff(first) - 1
        linear = starts[first[:-1] + 1] == starts[first[:-1]]
        return np.where(linear, sizes, sizes - 1 + completions)

    @property
    def record_costs(self) -> np.ndarray:
        """Tokens that each record takes in rows, int64[R]; 0 where it was dropped."""
        return np.diff(np.concatenate([[0], np.cumsum(self.costs)])[self.first_documents])

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """Tokens with a weight of each document, int64[D]."""
        ends = np.concatenate([[0], np.cumsum(self.weights > 0)])
        return np.diff(ends[self.part_starts[self.first_parts]])

    @functools.cached_property
    def digest(self) -> bytes:
        """sha256 of what is trained on: tokens, weights, boundaries, values; not where it came from."""
        digest = hashlib.sha256()
        arrays = {name: getattr(self, name) for name in ("tokens", "weights", "part_starts", "first_parts")}
        for name, array in {**arrays, "first_documents": self.first_documents, **self.values}.items():
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).data)
        return digest.digest()

    def without(self, faults: Sequence[Fault]) -> "Chunk":
        """The chunk less the documents of some records, each dropped for the fault given, whatever it had before."""
        gone = np.zeros(len(self.truncated), bool)
        gone[[fault.position for fault in faults]] = True
        documents = np.repeat(~gone, np.diff(self.first_documents.astype(np.int64)))
        parts = np.repeat(documents, np.diff(self.first_parts.astype(np.int64)))
        tokens = np.repeat(parts, np.diff(self.part_starts.astype(np.int64)))

        def starts(before, left):
            return np.concatenate([[0], np.cumsum(np.diff(before.astype(np.int64)) * left)]).astype(before.dtype)

        return dataclasses.replace(
            self,
            tokens=self.tokens[tokens],
            weights=self.weights[tokens],
            part_starts=starts(self.part_starts, parts)[np.r_[True, parts]],
            first_parts=starts(self.first_parts, documents)[np.r_[True, documents]],
            first_documents=starts(self.first_documents, ~gone),
            truncated=self.truncated & ~gone,
            **{name: getattr(self, name)[documents] for name in ("lines", "paths", "transforms")},
            faults=[fault for fault in self.faults if not gone[fault.position]] + list(faults),
            values={n: a[tokens if n.startswith("token.") else parts] for n, a in self.values.items()},
        )

    def pack(self) -> bytes:
        """The chunk as bytes with checksums, which `unpack` reads."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: fields.pop(name) for name in list(fields) if isinstance(fields[name], np.ndarray)}
        values = {f"values.{name}": array for name, array in fields.pop("values").items()}
        notes = np.frombuffer(json.dumps(fields).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays, **values, notes=notes)
        return file.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> "Chunk":
        """Raises ValueError where the bytes are not those of a whole chunk."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}  # zip files check a CRC of each
            notes = json.loads(arrays.pop("notes").tobytes())
            values = {name[7:]: arrays.pop(name) for name in list(arrays) if name.startswith("values.")}
            notes["faults"] = [Fault(*fault) for fault in notes["faults"]]
            return cls(**arrays, **notes, values=values)
        except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a whole chunk ({error})") from None


def encode_chunk(encoding: Encoding, source: Source, records: Sequence[int]) -> Chunk:
    """Reads, parses and tokenises some records. Faults of examples are noted in the chunk.

    Raises DataError: a fault of the file (broken JSON, a record of another format).
    """
    documents: list[list[Document]] = []
    truncated, faults = [], []
    detects = asks if encoding.kind == "prompt" else detect
    for position, index in enumerate(records):
        record, origin = source[int(index)]
        if encoding.detected and (this := detects(record, origin)) != encoding.format:
            raise DataError(
                f"{origin}: the record has the keys of format {this}, but the file began with {encoding.format}"
            )
        found, cut = [], False
        try:
            encoded = encode(
                read(record, origin, encoding.format, encoding.kind),
                int(index),
                template=encoding.template,
                tokenizer=encoding.tokenizer,
                max_tokens=encoding.max_tokens,
                on_long=encoding.on_long,
            )
            _check_row(encoded.documents, encoding.row_tokens)
            found, cut = encoded.documents, encoded.truncated
        except ExampleFault as fault:
            faults.append(Fault(position, fault.reason, fault.detail, origin.path, origin.line))
        documents.append(found)
        truncated.append(cut)
    return _join(documents, truncated, faults)


def _check_row(documents: list[Document], row_tokens: int | None) -> None:
    for document in documents:
        if row_tokens is not None and document.cost > row_tokens:
            detail = f"takes {document.cost} tokens, but a row holds {row_tokens} (batch.tokens_per_row)"
            raise ExampleFault("longer_than_row", detail, document.origin)


def _join(records: list[list[Document]], truncated: list[bool], faults: list[Fault]) -> Chunk:
    documents = [document for found in records for document in found]
    parts = [part for document in documents for part in (document.prompt, *document.completions)]
    weights = [part for d in documents for part in (np.zeros(len(d.prompt), np.float32), *d.weights)]
    path_names, paths = _numbered([document.origin.path for document in documents])
    transform_names, transforms = _numbered([document.transform for document in documents])
    return Chunk(
        tokens=_narrowest(np.concatenate([np.zeros(0, np.int32), *parts])),
        weights=_narrowest(np.concatenate([np.zeros(0, np.float32), *weights])),
        part_starts=_starts([len(part) for part in parts]),
        first_parts=_starts([1 + len(document.completions) for document in documents]),
        first_documents=_starts([len(found) for found in records]),
        truncated=np.array(truncated, bool),
        lines=_narrowest(np.array([document.origin.line for document in documents], np.int64)),
        paths=paths,
        transforms=transforms,
        path_names=path_names,
        transform_names=transform_names,
        faults=faults,
        values=_values(documents),
    )


def _values(documents: list[Document]) -> dict[str, np.ndarray]:
    """What the documents carry by name, flat; all carry the same names (see `rows.build_batch`)."""
    found: dict[str, list] = {}
    for document in documents:
        for name, completions in document.token.items():
            found.setdefault(f"token.{name}", []).extend([np.zeros(len(document.prompt)), *completions])
        for name, completions in document.completion.items():
            found.setdefault(f"completion.{name}", []).append([0.0, *completions])
    joined = {name: np.concatenate(parts).astype(np.float32) for name, parts in found.items()}
    tokens = sum(len(part) for document in documents for part in (document.prompt, *document.completions))
    parts = sum(1 + len(document.completions) for document in documents)
    for name, array in joined.items():
        if len(array) != (tokens if name.startswith("token.") else parts):
            raise DataError(f"{documents[0].origin.path}: some examples carry values of {name}, others none or too few")
    return joined


def _starts(sizes: list[int]) -> np.ndarray:
    return _narrowest(np.cumsum([0, *sizes]))


def _numbered(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts in order of appearance, and the number of each."""
    numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    return list(numbers), np.array([numbers[text] for text in texts], np.int32)


def _narrowest(array: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest of uint8, uint16, int32 and int64 that holds them; others as they are."""
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        limits = np.iinfo(dtype)
        if array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max):
            narrow = array.astype(dtype)
            if np.array_equal(narrow, array):
                return narrow
    return array
