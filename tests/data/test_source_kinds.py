"""Sources of every other kind: the same records as JSON lines give, by index, with origins that name the real file."""

import builtins
import hashlib
import json
import os
import sys

import fsspec
import fsspec.implementations.local
import numpy as np
import pytest
from etils.epath import backend

from jaxpost.data.formats import detect, parse
from jaxpost.data.sources import base, files, open_source, tables
from jaxpost.data.sources import prepared as prepared_sources
from jaxpost.errors import DataError

RECORDS = [
    {"messages": [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "x" * n}], "id": n}
    for n in range(7)
]


def records_of(source):
    return [source[index][0] for index in range(len(source))]


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_parquet(tmp_path):
    parquet, arrow = (
        pytest.importorskip("pyarrow.parquet", reason="the extra `parquet`"),
        pytest.importorskip("pyarrow"),
    )

    def write(records, name="a.parquet", **options):
        parquet.write_table(arrow.Table.from_pylist(records), tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("block", [1, 2, 5, 256])
def test_parquet_by_index(write_parquet, monkeypatch, rows, block):
    monkeypatch.setattr(base, "BLOCK", block)
    source = open_source(path := write_parquet(RECORDS, row_group_size=rows))
    assert len(source) == 7 and source.fingerprint == digest(path)
    for index in (6, 0, 3, 2, 5, 1, 4, -1):
        record, origin = source[index]
        assert record == RECORDS[index] and (origin.path, origin.line) == (str(path), index % 7 + 1)
    with pytest.raises(IndexError):
        source[7]


def test_row_groups_are_read_when_asked_for(write_parquet, monkeypatch):
    import pyarrow.parquet

    asked, original = [], pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(base, "BLOCK", 2)
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, n: asked.append(n) or original(self, n)
    )
    source = open_source(write_parquet(RECORDS * 4, row_group_size=2))
    assert asked == []
    _ = [source[index] for index in (20, 21, 0, 20, 1)]
    assert asked == [10, 0]
    records_of(source)
    assert len(asked) <= 2 + 14 and tables.GROUPS_KEPT < 14


def test_a_field_that_only_some_rows_have(write_parquet):
    """All rows of a table have the same fields: a null must not pass for a key of the record."""
    records = [
        {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            "label": None,
            "raw": b"bytes",
        },
        {"messages": [{"role": "assistant", "content": "", "name": "me"}], "label": True, "raw": b"\xff"},
    ]
    source = open_source(write_parquet(records))
    assert records_of(source) == [{"messages": records[0]["messages"], "raw": "bytes"}, records[1]]
    assert detect(*source[0]) == "messages" and parse(*source[0]).completions[0][1]["content"] == "!"


def test_parquet_that_is_none(tmp_path, write_parquet):
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file that can be read"):
        open_source(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: holds no records"):
        open_source(write_parquet([]))


@pytest.mark.parametrize(
    "module, path, extra",
    [("pyarrow", "a.parquet", "parquet"), ("datasets", "hf:a", "hf"), ("tensorflow_datasets", "tfds:a", "tfds")],
)
def test_an_absent_extra_is_named(tmp_path, monkeypatch, module, path, extra):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=module)
        return real(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(DataError, match=rf"{path}: .* needs the package {module}: pip install 'jaxpost\[{extra}\]'"):
        open_source(path)


# --- ArrayRecord ------------------------------------------------------------------------------------------------------


def write_array_record(path, contents, group=1):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), f"group_size:{group}")
    for content in contents:
        writer.write(content)
    writer.close()
    return path


def test_array_record_by_index(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [json.dumps(record).encode() for record in RECORDS])
    source = open_source(path)
    assert records_of(source) == RECORDS and source.fingerprint == digest(path)
    assert str(source[-2][1]) == f"{path}:6"


def test_array_record_faults(tmp_path):
    source = open_source(write_array_record(tmp_path / "a.arrayrecord", [b'{"a": 1}', b"\x0a\x0b", b"[1]"]))
    with pytest.raises(DataError, match=r"a\.arrayrecord:2: broken JSON"):
        source[1]
    with pytest.raises(DataError, match=r"a\.arrayrecord:3: a record must be a JSON object"):
        source[2]
    (tmp_path / "b.array_record").write_bytes(b"nothing of the kind" * 99)
    with pytest.raises(DataError, match=r"b\.array_record: not an ArrayRecord file"):
        open_source(tmp_path / "b.array_record")


# --- folders, patterns, remote files ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three files of 3, 2 and 2 records, and what else lies about in a folder of data."""
    write_lines(tmp_path / "data" / "b.jsonl", RECORDS[3:5])
    write_lines(tmp_path / "data" / "a.jsonl", RECORDS[:3])
    (tmp_path / "data" / "c.json").write_text(json.dumps(RECORDS[5:]))
    (tmp_path / "data" / "README.md").write_text("data")
    (tmp_path / "data" / ".hidden.json").write_text("{")
    (tmp_path / "data" / "sub").mkdir()
    return tmp_path / "data"


def test_a_folder_is_one_source(folder, caplog):
    with caplog.at_level("INFO", "jaxpost"):
        source = open_source(folder)
    assert "passed over: README.md, sub" in caplog.text
    assert (source.path, len(source)) == (str(folder), 7) and records_of(source) == RECORDS
    assert [str(source[index][1]) for index in (0, 2, 3, -1)] == [
        f"{folder}/{place}" for place in ("a.jsonl:1", "a.jsonl:3", "b.jsonl:1", "c.json:2")
    ]
    with pytest.raises(IndexError):
        source[7]
    before = source.fingerprint
    (folder / "a.jsonl").rename(folder / "d.jsonl")
    assert open_source(folder).fingerprint != before  # the order counts


def test_patterns(folder, monkeypatch):
    assert records_of(open_source(f"{folder}/*.jsonl")) == RECORDS[:5]
    assert records_of(open_source(f"{folder.parent}/**/[bc].*")) == RECORDS[3:]
    monkeypatch.chdir(folder)
    assert str(open_source("?.json")[0][1]) == "c.json:1"
    with pytest.raises(DataError, match=r"/x\*\.jsonl: no file fits this pattern"):
        open_source(f"{folder}/x*.jsonl")
    with pytest.raises(DataError, match="sub: no data files in this folder"):
        open_source(folder / "sub")
    write_lines(folder / "[1].jsonl", RECORDS[:1])
    assert len(open_source(folder / "[1].jsonl")) == 1  # a name that only looks like a pattern


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket/... is a local folder; the files opened are counted."""
    opened = []

    class Bucket(fsspec.implementations.local.LocalFileSystem):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            path = os.fspath(path)
            return str(tmp_path / path.removeprefix("gs://")) if path.startswith("gs://") else path

        def glob(self, path, **kwargs):
            return [found.removeprefix(f"{tmp_path}/") for found in super().glob(self._strip_protocol(path), **kwargs)]

        def open(self, path, mode="rb", **kwargs):
            opened.append(os.path.basename(path))
            return super().open(path, mode, **kwargs)

    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Bucket())
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket", opened


def test_remote_files(bucket, tmp_path, write_parquet, monkeypatch):
    folder, opened = bucket
    write_lines(folder / "a.jsonl", RECORDS[:3])
    write_parquet(RECORDS[3:], "bucket/b.parquet")
    source = open_source("gs://bucket/*", tmp_path / "cache")
    assert records_of(source) == RECORDS and str(source[3][1]) == "gs://bucket/b.parquet:1"
    assert records_of(open_source("gs://bucket", tmp_path / "cache")) == RECORDS
    assert sorted(opened) == ["a.jsonl", "a.jsonl", "b.parquet"]  # Parquet is copied to the cache, once
    opened.clear()
    monkeypatch.setattr(files, "CACHED_FROM", 1)
    for _ in range(2):
        assert records_of(open_source("gs://bucket/a.jsonl", tmp_path / "cache")) == RECORDS[:3]
    assert opened == ["a.jsonl"]
    with pytest.raises(DataError, match=r"gs://bucket/b\.parquet: files of this kind are read from a local disk"):
        open_source("gs://bucket/b.parquet")
    with pytest.raises(DataError, match=r"\*\* is for local patterns"):
        open_source("gs://**/b.parquet")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("a/b", ("a/b", "train")),
        ("a:test", ("a", "test")),
        ("a:1.0.0", ("a:1.0.0", "train")),
        ("a/c:1.0.0:test[:10%]+train[5:]", ("a/c:1.0.0", "test[:10%]+train[5:]")),
        ("gs://bucket/a", ("gs://bucket/a", "train")),
        ("gs://bucket/a/1.0.0:test", ("gs://bucket/a/1.0.0", "test")),
    ],
)
def test_names_and_splits(name, parts):
    assert prepared_sources._split_of(name) == parts


# --- data sets of other libraries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Hugging Face dataset and a DatasetDict saved to disk, and a folder of Parquet that the library loads."""
    datasets = pytest.importorskip("datasets", reason="the extra `hf`")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hf")
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(folder / "one", num_shards=2)
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(2))}).save_to_disk(folder / "two")
    (folder / "raw").mkdir()
    dataset.to_parquet(folder / "raw" / "train.parquet")
    return folder


def test_a_saved_hugging_face_dataset(saved):
    source = open_source(saved / "one")
    assert records_of(source) == RECORDS and str(source[-1][1]) == f"{saved}/one:7"
    assert records_of(open_source(saved / "two" / "test")) == RECORDS[:2]
    with pytest.raises(
        DataError, match=r"two: a saved Hugging Face DatasetDict; name one of its splits: .*test, .*tra"
    ):
        open_source(saved / "two")


@pytest.mark.filterwarnings("default")  # of the library
def test_a_named_hugging_face_dataset(saved, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", saved / "cache")
    whole, part = open_source(f"hf:{saved}/raw"), open_source(f"hf:{saved}/raw:train[:3]")
    assert (records_of(whole), records_of(part)) == (RECORDS, RECORDS[:3])
    assert whole.path == f"hf:{saved}/raw" and whole.fingerprint != part.fingerprint
    with pytest.raises(DataError, match='cannot load it \\(ValueError: Unknown split "test"'):
        open_source(f"hf:{saved}/raw:test")


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
    """A small data set written by TFDS."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `tfds`")
    turns = {"role": tfds.features.Text(), "content": tfds.features.Text()}

    class Little(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"messages": tfds.features.Sequence(turns), "more": tfds.features.Dataset(turns), "id": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(RECORDS), "test": self._generate_examples(RECORDS[:2])}

        def _generate_examples(self, records):
            for record in records:
                yield record["id"], record | {"more": record["messages"][1:]}

    tfds.disable_progress_bar()
    builder = Little(data_dir=tmp_path_factory.mktemp("tfds"), file_format=request.param)
    builder.download_and_prepare()
    return builder.data_path


def test_tfds_without_tensorflow(prepared):
    source = open_source(prepared)
    expected = [record | {"more": record["messages"][1:]} for record in RECORDS]
    found = records_of(source)
    assert sorted(found, key=lambda record: record["id"]) == expected  # TFDS shuffles what it writes
    assert [source[index][0] for index in (5, 1)] == [found[5], found[1]]
    assert str(source[6][1]) == f"{prepared}:7"
    test = open_source(f"tfds:{prepared}:test")
    assert sorted(record["id"] for record in records_of(test)) == [0, 1]
    assert len({s.fingerprint for s in (source, test, open_source(f"tfds:{prepared}:train[:2]"))}) == 3
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match=r"TFDS cannot open it .*Unknown split 'nothing'"):
        open_source(f"tfds:{prepared}:nothing")


def test_tfds_by_name(prepared, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(prepared.parents[1]))
    assert len(open_source("tfds:little")) == len(open_source("tfds:little:1.0.0")) == 7
    assert len(open_source("tfds:little:1.0.0:test")) == 2
    with pytest.raises(DataError, match="tfds:no_such_set: TFDS cannot open it"):
        open_source("tfds:no_such_set")
