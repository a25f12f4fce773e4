"""Sources of JSON, plain and packed: random access; the index in the cache; each fault names file and line."""

import gzip
import json
import os
import re
import shutil

import numpy as np
import pytest
import zstandard

from jaxpost.data.sources import files, open_source
from jaxpost.errors import DataError

RECORDS = [{"text": "eins"}, {"text": "zwei é 😀"}, {"text": "line\nbreak"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)


def write(folder, name, text):
    content = text.encode() if isinstance(text, str) else text
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(os.path.splitext(name.lower())[1], bytes)
    (folder / name).write_bytes(pack(content))
    return folder / name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.jsonl.zst", "A.JSONL.ZST"])
@pytest.mark.parametrize("text", [LINES, LINES + "\n", LINES.replace("\n", "\r\n"), "\ufeff" + LINES])
def test_json_lines_by_index(tmp_path, name, text):
    source = open_source(write(tmp_path, name, text))
    assert len(source) == 3
    for index in (2, 0, 1, -1):  # in any order
        record, origin = source[index]
        assert record == RECORDS[index]
        assert (origin.path, origin.line) == (str(tmp_path / name), index % 3 + 1)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_a_json_list(tmp_path, name):
    source = open_source(write(tmp_path, name, "\n " + json.dumps(RECORDS, indent=1)))
    assert [source[i][0] for i in range(len(source))] == RECORDS
    assert [source[i][1].line for i in (1, -1)] == [2, 3]  # its place in the list


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    source = open_source(write(tmp_path, "a.jsonl", '\n{"a": 1}\n\n   \n\r\n{"a": 2}\n\n'))
    assert [source[i][0]["a"] for i in range(len(source))] == [1, 2]
    assert [source[i][1].line for i in range(len(source))] == [2, 6]


def test_lines_found_in_chunks(tmp_path):
    content = write(tmp_path, "a.jsonl", LINES).read_bytes()
    whole = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for chunk in (1, 7, len(content), 1000):
        assert files._index(content, chunk).ends.tolist() == [*whole, len(content)]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, two = write(tmp_path, "a.jsonl", LINES), write(tmp_path, "b.jsonl.gz", LINES)
    other = write(tmp_path, "c.jsonl", LINES + " ")
    assert open_source(one).fingerprint == open_source(two).fingerprint != open_source(other).fingerprint


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl.gz", " \n\n", "a.jsonl.gz: the file is empty"),
        ("a.json", "[]", "a.json: the list is empty"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json:2: broken JSON at column 6"),
        ("a.csv", "a,b", "a.csv: unknown kind of data file; known are .jsonl, .json"),
        ("a.parquet.gz", "x", "a.parquet.gz: unknown kind of data file"),
        ("a.jsonl", b'\xff{"a": 1}', "not UTF-8"),
    ],
)
def test_faults_of_a_file(tmp_path, name, text, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        source = open_source(write(tmp_path, name, text))
        source[0]
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name, kind", [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
def test_packed_files_that_are_broken(tmp_path, name, kind):
    content = write(tmp_path, name, LINES * 100).read_bytes()
    for broken in (content[:-9], content[: len(content) // 2], b"no such packing", content + b"more"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=f"{name}: broken {kind} file"):
            open_source(tmp_path / name)


def test_packed_files_of_several_frames(tmp_path):
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(b"".join(pack(part) for part in (b'{"a": 1}\n{"a"', b"", b': 2}\n{"a": 3}')))
        source = open_source(tmp_path / name)
        assert [source[n][0]["a"] for n in range(len(source))] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"a": 1', "{'a': 1}", '{"a": 1} x'])
def test_broken_json_names_its_line(tmp_path, line):
    source = open_source(write(tmp_path, "a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 3}}'))
    assert source[2][0] == {"a": 3}
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON at column \d+"):
        source[1]


@pytest.mark.parametrize("name, text", [("a.jsonl", '{"a": 1}\n[1]'), ("a.json", '[{"a": 1}, 5]')])
def test_a_record_must_be_an_object(tmp_path, name, text):
    with pytest.raises(DataError, match=r":2: a record must be a JSON object, found (list|int)"):
        open_source(write(tmp_path, name, text))[1]


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder in which files of any size are remembered."""
    monkeypatch.setattr(files, "CACHED_FROM", 1)
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch):
    """The contents that were gone through for their lines, one entry each time."""
    contents, original = [], files._index
    monkeypatch.setattr(files, "_index", lambda data: contents.append(bytes(data)) or original(data))
    return contents


def everything(source):
    return [source[n] for n in range(len(source))], source.fingerprint


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_the_index_is_made_once(tmp_path, cache, built, name):
    text = json.dumps(RECORDS) if name == "a.json" else f"\n{LINES}\n\n  \n"
    path = write(tmp_path, name, text)
    fresh = everything(open_source(path))
    assert len(fresh[0]) == 3
    built.clear()
    assert everything(open_source(path, cache)) == everything(open_source(path, cache)) == fresh
    assert built == [text.encode()]


def test_small_files_are_not_remembered(tmp_path):
    open_source(write(tmp_path, "a.jsonl.gz", LINES), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_read_anew(tmp_path, cache):
    """Of the same size, and even with its old time of change set back."""
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}')
    before = os.stat(path)
    assert len(open_source(path, cache)) == 2
    write(tmp_path, "a.jsonl", '{"a": 1234567890}')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size and os.stat(path).st_mtime_ns == before.st_mtime_ns
    source = open_source(path, cache)
    assert len(source) == 1 and source.fingerprint == open_source(path).fingerprint
    assert len(list(cache.iterdir())) == 1  # what was kept of the earlier state is gone


def test_a_change_within_the_second_where_times_are_whole_seconds(tmp_path, cache):
    path = write(tmp_path, "a.jsonl", LINES)
    now = int(os.stat(path).st_mtime)
    os.utime(path, (now, now))
    open_source(path, cache)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "foreign", "not json", "too long"])
def test_a_damaged_index_is_made_again(tmp_path, cache, built, name, damage):
    path = write(tmp_path, name, LINES)
    fresh = everything(open_source(path, cache))
    (file,) = cache.glob("*.lines")
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-3],
            "empty": b"",
            "flip": whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:],
            "foreign": whole.replace(b"jaxpost index 1", b"jaxpost index 0"),
            "not json": b"\xff" * len(whole),
            "too long": whole + whole[-8:],
        }[damage]
    )
    built.clear()
    assert everything(open_source(path, cache)) == fresh
    assert built == [LINES.encode()] and file.read_bytes() == whole


def test_damaged_unpacked_content_is_made_again(tmp_path, cache):
    path = write(tmp_path, "a.jsonl.zst", LINES)
    fresh = everything(open_source(path, cache))
    (file,) = cache.glob("*.content")
    file.write_bytes(file.read_bytes()[:-5])
    assert everything(open_source(path, cache)) == fresh
    assert file.read_bytes() == LINES.encode()


def test_nothing_half_written_stays(tmp_path, cache, monkeypatch):
    path = write(tmp_path, "a.jsonl.gz", LINES * 100)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="broken gzip"):
        open_source(path, cache)
    assert list(cache.iterdir()) == []
    full = shutil.disk_usage(tmp_path)._replace(free=files.SPARE)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(DataError, match="no room for this cache"):
        open_source(write(tmp_path, "b.jsonl.gz", LINES), cache)
    assert list(cache.iterdir()) == []


def test_unpacking_is_said(tmp_path, cache, caplog):
    path = write(tmp_path, "a.jsonl.gz", LINES)
    with caplog.at_level("INFO", "jaxpost"):
        open_source(path, cache)
        open_source(path, cache)
    assert caplog.text.count("unpacked once") == 1 and str(path) in caplog.text


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, cache, monkeypatch):
    path, original = write(tmp_path, "a.jsonl", LINES), files._index

    def meanwhile(data):
        os.utime(path, (1, 1))
        return original(data)

    monkeypatch.setattr(files, "_index", meanwhile)
    assert len(open_source(path, cache)) == 3
    assert not cache.exists()


def test_lines_by_a_loop(tmp_path):
    """Against a loop over lines, on random bytes of which many are white space."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        content = bytes(generator.choice(list(b"a \t\r\n\n"), size=generator.integers(1, 60)))
        found = files._index(content, chunk=int(generator.integers(1, 9)))
        lines = content.split(b"\n")
        ends = np.cumsum([len(line) + 1 for line in lines]) - 1
        assert found.ends.tolist() == ends.tolist()
        assert found.blank.tolist() == [n for n, line in enumerate(lines) if not line.strip(b" \t\r")]
