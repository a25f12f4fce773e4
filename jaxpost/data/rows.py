"""Documents into packed rows, and values of rows back to documents. Plain numpy; the layout is that of `types.Rows`."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxpost.errors import DataError
from jaxpost.types import Array, Batch, Document, Rows


def pack(costs: Sequence[int], tokens_per_row: int, documents_per_row: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still holds it.

    Ties go to the earlier document and the earlier row, so the result depends on the arguments alone.

    Args:
      costs: tokens that each document takes in a row (`Document.cost`).
      tokens_per_row: capacity of a row.
      documents_per_row: most documents in a row (M).

    Returns:
      Indices into `costs` for each row, every index exactly once.

    Raises:
      DataError: a document alone is longer than a row.
    """
    costs = np.asarray(costs, np.int64)
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted: the best fit is the first that is large enough
    for index in np.argsort(-costs, kind="stable").tolist():
        cost = int(costs[index])
        if cost > tokens_per_row:
            raise DataError(f"document {index} takes {cost} tokens, but a row holds {tokens_per_row}")
        fit = bisect.bisect_left(open_rows, (cost, 0))
        left, row = open_rows.pop(fit) if fit < len(open_rows) else (tokens_per_row, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if len(rows[row]) < documents_per_row and left > cost:
            bisect.insort(open_rows, (left - cost, row))
    return rows


def build_batch(
    rows: Sequence[Sequence[Document]],
    *,
    rows_per_step: int,
    tokens_per_row: int,
    documents_per_row: int,
    branches: int,
) -> Batch:
    """Lays documents out as `types.Rows` describes: one row of the batch for each list of documents.

    Args:
      rows: at most `rows_per_step` (B) lists; what is missing stays empty (weight 0).
      tokens_per_row: T.
      documents_per_row: M.
      branches: N, the most completions of a document; 0 where all documents are linear, and `completion` is then {}.

    Returns:
      A numpy batch. `token` and `completion` hold what the documents carry under these names: per-token values at
      the tokens of their completion (0 elsewhere; trailing dimensions are kept), per-completion values where
      `completion["mask"]` is 1 (0 elsewhere).

    Raises:
      DataError: a row, a document or a number of completions does not fit, or documents carry different names.
    """
    documents = [document for row in rows for document in row]
    _check_fit(rows, rows_per_step, tokens_per_row, documents_per_row, branches)
    segments = [m + 1 for row in rows for m in range(len(row))]
    flat = _Flat(documents, segments)

    used = np.zeros(rows_per_step, np.int64)
    used[: len(rows)] = [sum(document.cost for document in row) for row in rows]
    occupied = np.arange(tokens_per_row) < used[:, None]  # rows fill from the left, so this mask's order is flat's

    def place(values: np.ndarray) -> np.ndarray:
        out = np.zeros((*occupied.shape, *values.shape[1:]), values.dtype)
        out[occupied] = values
        return out

    names = _common_names(documents, "token")
    token = {name: place(flat.of_completions([document.token[name] for document in documents])) for name in names}
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    document_of = (row_of, np.array(segments, np.int64) - 1)
    example_ids = np.full((rows_per_step, documents_per_row), -1, np.int32)
    example_ids[document_of] = [document.example_id for document in documents]
    return Batch(
        rows=Rows(
            tokens=place(flat.tokens),
            segments=place(flat.segments),
            branches=place(flat.branches),
            positions=place(flat.positions),
            weights=place(flat.weights),
        ),
        token=token,
        completion=_per_completion(documents, document_of, (*example_ids.shape, branches)),
        example_ids=example_ids,
    )


class _Flat:
    """The documents' tokens one after another, without the empty ends of the rows: every field is [tokens].

    A run is one (segment, branch): a prompt without its last token, that last token and a completion, or a linear
    document.
    """

    def __init__(self, documents: Sequence[Document], segments: Sequence[int]):
        pieces: list[Array] = [np.zeros(0, np.int32)]
        runs: list[tuple[int, int, int, int, int]] = []  # length, segment, branch, first position, first own token
        for document, segment in zip(documents, segments, strict=True):
            prompt, completions = document.prompt, document.completions
            if document.linear:
                pieces.append(completions[0])
                runs.append((len(completions[0]), segment, 0, 0, 0))
                continue
            start = len(prompt) - 1
            pieces.append(prompt[:-1])
            runs.append((start, segment, 0, 0, start))
            for branch, completion in enumerate(completions, start=1):
                pieces += (prompt[-1:], completion)
                runs.append((1 + len(completion), segment, branch, start, 1))
        lengths, segment, branch, start, own = np.array(runs, np.int32).reshape(-1, 5).T
        run_starts = np.cumsum(lengths) - lengths
        offsets = np.arange(lengths.sum(), dtype=np.int32) - np.repeat(run_starts, lengths)  # place in the run

        self.tokens = np.concatenate(pieces).astype(np.int32)
        self.segments = np.repeat(segment, lengths)
        self.branches = np.repeat(branch, lengths)
        self.positions = (offsets + np.repeat(start, lengths)).astype(np.int32)
        self._own = offsets >= np.repeat(own, lengths)  # the completions, without any token of a prompt
        self.weights = self.of_completions([document.weights for document in documents]).astype(np.float32)
        self.weights[offsets == 0] = 0  # nothing in the row predicts the first token of a run

    def of_completions(self, values: Sequence[Sequence[Array]]) -> np.ndarray:
        """values[document][completion] is [C_n, ...]; returns [tokens, ...] with them at their tokens, 0 elsewhere."""
        parts = [np.asarray(part) for completions in values for part in completions]
        if not parts:
            return np.zeros(len(self._own), np.float32)
        joined = np.concatenate(parts)
        out = np.zeros((len(self._own), *joined.shape[1:]), _narrow(joined.dtype))
        out[self._own] = joined
        return out


def _narrow(dtype: np.dtype) -> type:
    return np.int32 if np.issubdtype(dtype, np.integer) else np.float32


def _per_completion(documents: Sequence[Document], document_of, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """{"mask": f32[B, M, N], and each name that the documents carry}; {} where N is 0."""
    if shape[-1] == 0:
        return {}
    counts = np.array([0 if document.linear else len(document.completions) for document in documents], np.int64)
    branch = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    index = (*(np.repeat(axis, counts) for axis in document_of), branch)
    branching = [document for document in documents if not document.linear]
    values = {"mask": np.ones(len(branch), np.float32)}
    for name in _common_names(branching, "completion"):
        values[name] = np.array([value for document in branching for value in document.completion[name]], np.float32)
    arrays = {name: np.zeros(shape, np.float32) for name in values}
    for name, array in arrays.items():
        array[index] = values[name]
    return arrays


def _common_names(documents: Sequence[Document], field: str) -> list[str]:
    names = sorted(getattr(documents[0], field)) if documents else []
    for document in documents:
        if sorted(getattr(document, field)) != names:
            raise DataError(
                f"{document.origin}: carries the {field} values {sorted(getattr(document, field))}, but others of the "
                f"same step carry {names}; all need the same"
            )
    return names


def _check_fit(rows, rows_per_step: int, tokens_per_row: int, documents_per_row: int, branches: int) -> None:
    if len(rows) > rows_per_step:
        raise DataError(f"{len(rows)} rows given, but a step holds {rows_per_step}")
    for row in rows:
        cost = sum(document.cost for document in row)
        if cost > tokens_per_row:
            raise DataError(f"{row[0].origin}: its row takes {cost} tokens, but a row holds {tokens_per_row}")
        if len(row) > documents_per_row:
            raise DataError(f"{row[0].origin}: its row has {len(row)} documents, but a row holds {documents_per_row}")
        for document in row:
            if not document.linear and len(document.completions) > branches:
                raise DataError(
                    f"{document.origin}: has {len(document.completions)} completions, but at most {branches} fit"
                )


def take_rows(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""
    return Batch(
        rows=Rows(**{field.name: getattr(batch.rows, field.name)[rows] for field in dataclasses.fields(Rows)}),
        token={name: values[rows] for name, values in batch.token.items()},
        completion={name: values[rows] for name, values in batch.completion.items()},
        example_ids=batch.example_ids[rows],
    )


def gather_completions(values: Array, rows: Rows) -> list[list[tuple[np.ndarray, ...]]]:
    """The reverse of laying out: per-token values [B, T, ...] of a batch back to its completions.

    Returns:
      [row][document of the row][completion]: an array [C_n, ...], aligned with `Document.completions`. What a linear
      document has at its first token is kept, though nothing predicts it.
    """
    values, segments, branches = np.asarray(values), np.asarray(rows.segments), np.asarray(rows.branches)
    result: list[list[tuple[np.ndarray, ...]]] = []
    for row_values, row_segments, row_branches in zip(values, segments, branches, strict=True):
        changes = np.flatnonzero((np.diff(row_segments) != 0) | (np.diff(row_branches) != 0)) + 1
        bounds = [0, *changes.tolist(), len(row_segments)]
        documents: list[list[np.ndarray]] = []
        for start, end in itertools.pairwise(bounds):
            segment, branch = row_segments[start], row_branches[start]
            if segment == 0:
                continue
            if segment > len(documents):
                documents.append([])
            if branch == 0:  # a linear document, unless branches follow
                documents[-1].append(row_values[start:end])
                continue
            if branch == 1:
                documents[-1].clear()
            documents[-1].append(row_values[start + 1 : end])
        result.append([tuple(document) for document in documents])
    return result
