"""The store of per-token values: what was saved is read back, and nothing else is."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from jaxpost.data import values as values_module
from jaxpost.data.rows import build_batch, gather_completions
from jaxpost.data.values import ValueStore, attach, key
from jaxpost.errors import DataError
from tests.data.test_rows import branching, linear

KEY = key(model="m", data="d")
DOCUMENTS = [branching([1, 2], [[3, 4, 5], [6]], 0), linear([7, 8], 1), branching([1], [[9], [2, 3], [4]], 2)]
VALUES = [([0.5, 1.5, 2.5], [3.5]), ([4.5, 5.5],), ([6.5], [7.5, 8.5], [9.5])]


def filled():
    store = ValueStore.for_documents(DOCUMENTS)
    for index in (2, 0, 1):  # in any order
        store[index] = [np.array(v, np.float32) for v in VALUES[index]]
    return store


def check(store):
    assert len(store) == 3
    for index, expected in enumerate(VALUES):
        assert [v.tolist() for v in store[index]] == [list(v) for v in expected]
        assert all(v.dtype == np.float32 for v in store[index])
    assert [v.tolist() for v in store[-1]] == [list(v) for v in VALUES[-1]]
    with pytest.raises(IndexError):
        store[3]


def test_saved_and_opened(tmp_path):
    check(filled())
    path = tmp_path / "new" / "folder" / "logps"
    filled().save(path, KEY)
    check(ValueStore.open(path, KEY))
    assert os.listdir(path.parent) == ["logps"]


def test_a_remote_path_is_read_whole(tmp_path, monkeypatch):
    """With no bucket at hand, the local file takes the way of remote ones."""
    filled().save(tmp_path / "logps", KEY)
    monkeypatch.setattr(values_module, "_is_remote", lambda path: True)
    filled().save(tmp_path / "again", KEY)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "logps").read_bytes()
    check(ValueStore.open(tmp_path / "again", KEY))


@pytest.mark.parametrize("path, remote", [("gs://bucket/a", True), ("/home/a", False), ("a", False)])
def test_which_paths_are_remote(path, remote):
    assert values_module._is_remote(epath.Path(path)) is remote


def test_opened_values_are_read_only_when_asked_for(tmp_path):
    filled().save(tmp_path / "logps", KEY)
    opened = ValueStore.open(tmp_path / "logps", KEY)[0][0]
    assert not opened.flags.writeable and not opened.flags.owndata


def test_none_where_there_is_no_file(tmp_path):
    assert ValueStore.open(tmp_path / "logps", KEY) is None


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-4], "bytes, a whole one would have"),
        (lambda data: data + b"0000", "bytes, a whole one would have"),
        (lambda data: data[:20], "not a file of values"),
        (lambda data: b"", "not a file of values"),
        (lambda data: b"\xff\xfe\n" + data, "not a file of values"),
        (lambda data: b"3\n", "not a file of values"),
        (lambda data: data.replace(b"values 1", b"values 0"), "not a file of values"),
        (lambda data: data.replace(KEY.encode(), key().encode()), "another model, data set or template"),
    ],
    ids=["cut", "longer", "cut in its header", "empty", "not text", "not an object", "other version", "other key"],
)
def test_a_damaged_file_is_named_and_not_used(tmp_path, damage, message):
    path = tmp_path / "logps"
    filled().save(path, KEY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{path}: not used, .*{message}"):
        assert ValueStore.open(path, KEY) is None
    filled().save(path, KEY)  # and is replaced by the next
    check(ValueStore.open(path, KEY))


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_an_interrupted_save_leaves_nothing_and_breaks_nothing(tmp_path, monkeypatch, fails):
    path = tmp_path / "logps"
    filled().save(path, KEY)
    other = filled()
    other[1] = [[0.0, 0.0]]

    def stop(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if fails == "fsync" else (type(epath.Path(path)), "replace")), stop)
        with pytest.raises(OSError, match="No space"):
            other.save(path, KEY)
    check(ValueStore.open(path, KEY))
    assert os.listdir(tmp_path) == ["logps"]


def test_a_killed_save_is_not_taken_for_a_store(tmp_path):
    """What kill -9 leaves is a file of another name."""
    script = f"""
import os, signal
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
from tests.data.test_values import KEY, filled
filled().save({str(tmp_path / "logps")!r}, KEY)
"""
    root = pathlib.Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial")
    assert ValueStore.open(tmp_path / "logps", KEY) is None


def test_values_that_are_missing_are_not_saved(tmp_path):
    store = filled()
    store[1] = [[0.0, np.nan]]
    with pytest.raises(DataError, match="logps: the values of document 1 are not set"):
        store.save(tmp_path / "logps", KEY)
    with pytest.raises(DataError, match="document 0"):
        ValueStore.for_documents(DOCUMENTS).save(tmp_path / "logps", KEY)
    assert not os.listdir(tmp_path)


def test_values_of_other_lengths_are_refused():
    store = ValueStore.for_documents(DOCUMENTS)
    with pytest.raises(ValueError, match=r"document 1: \(3,\) values, 2 tokens"):
        store[1] = [[1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="zip"):
        store[0] = [[1.0, 2.0, 3.0]]


def test_several_values_a_token_are_kept_in_their_type(tmp_path):
    """Their file is read back with its shape, attached, laid out in rows and gathered again."""
    rng = np.random.default_rng(0)
    shapes = [[(len(c), 4) for c in document.completions] for document in DOCUMENTS]
    for type, draw in (("i4", lambda s: rng.integers(0, 99, s, np.int32)), ("f4", lambda s: rng.random(s, np.float32))):
        values = [tuple(draw(shape) for shape in document) for document in shapes]
        store = ValueStore.for_documents(DOCUMENTS, 4, type)
        with pytest.raises(DataError, match="the values of document 0 are not set"):
            store.save(tmp_path / type, KEY)
        for index, document in enumerate(values):
            store[index] = document
        store.save(tmp_path / type, KEY)
        opened = ValueStore.open(tmp_path / type, KEY)
        assert opened[0][0].shape == (3, 4) and opened[0][0].dtype == np.dtype(type)
        batch = build_batch(
            [attach(DOCUMENTS, "top", opened)], rows_per_step=1, tokens_per_row=32, documents_per_row=3, branches=3
        )
        assert batch.token["top"].shape == (1, 32, 4) and batch.token["top"].dtype == np.dtype(type)
        for found, expected in zip(gather_completions(batch.token["top"], batch.rows)[0], values, strict=True):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


class TestKey:
    def test_depends_on_every_part_and_on_no_order(self):
        assert key(a=1, b=[2, {"c": "d"}]) == key(b=[2, {"c": "d"}], a=1)
        assert len({key(), key(a=1), key(a=2), key(b=1), key(a="1"), key(a=[1])}) == 6

    def test_is_the_same_in_every_process(self):
        """What `printf '{"a": 1}' | sha256sum` prints."""
        assert key(a=1) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"

    def test_refuses_what_has_no_fixed_text(self):
        with pytest.raises(TypeError):
            key(a=pathlib.Path("x"))


class TestAttach:
    def test_documents_carry_the_values(self):
        attached = attach(DOCUMENTS, "reference_logps", filled())
        assert len(attached) == 3
        for document, original, expected in zip(attached, DOCUMENTS, VALUES, strict=True):
            assert document.completions is original.completions and original.token == {}
            assert [v.tolist() for v in document.token["reference_logps"]] == [list(v) for v in expected]

    def test_from_rows_and_back_into_rows(self):
        """The way of reference values: computed in rows, gathered, stored, attached, laid out again."""
        documents = [DOCUMENTS[0], DOCUMENTS[2]]
        shape = {"rows_per_step": 1, "tokens_per_row": 20, "documents_per_row": 2, "branches": 3}
        rows = build_batch([documents], **shape).rows
        computed = np.arange(1, 21, dtype=np.float32)[None]
        store = ValueStore.for_documents(documents)
        for index, completions in enumerate(gather_completions(computed, rows)[0]):
            store[index] = completions
        batch = build_batch([list(attach(documents, "logps", store))], **shape)
        np.testing.assert_array_equal(batch.token["logps"], computed * (rows.weights > 0))

    def test_keeps_values_that_are_there(self):
        documents = [linear([1, 2], 0, advantage=[0.5, 1.5])]
        store = ValueStore.for_documents(documents)
        store[0] = [[2.5, 3.5]]
        assert attach(documents, "logps", store)[0].token.keys() == {"advantage", "logps"}

    def test_refuses_other_documents(self):
        with pytest.raises(DataError, match="logps: values of 3 documents, but the data has 2"):
            attach(DOCUMENTS[:2], "logps", filled())
        with pytest.raises(DataError, match=r"data.jsonl:2: logps has values for other completions"):
            attach([DOCUMENTS[1], DOCUMENTS[1], DOCUMENTS[2]], "logps", filled())[0]


def test_the_file_is_what_its_docstring_says(tmp_path):
    filled().save(tmp_path / "logps", KEY)
    line, data = (tmp_path / "logps").read_bytes().split(b"\n", 1)
    assert json.loads(line) == {
        "format": "jaxpost values 1",
        "key": KEY,
        "documents": 3,
        "completions": 6,
        "tokens": 10,
    }
    assert (len(line) + 1) % 4 == 0
    assert np.frombuffer(data[: 4 * 9], "<i4").tolist() == [2, 1, 3, 3, 1, 2, 1, 2, 1]
    assert np.frombuffer(data[4 * 9 :], "<f4").tolist() == [v + 0.5 for v in range(10)]
