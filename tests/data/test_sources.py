"""Sources: random access to JSON and JSON lines, plain and gzipped; each fault names file and line."""

import gzip
import json
import re

import pytest

from jaxpost.data import sources
from jaxpost.data.sources import open_source
from jaxpost.errors import DataError

RECORDS = [{"text": "eins"}, {"text": "zwei é 😀"}, {"text": "line\nbreak"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)


def write(folder, name, text):
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
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
        assert sources._newlines(content, chunk).tolist() == whole


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
        ("a.jsonl", b'\xff{"a": 1}', "not UTF-8"),
    ],
)
def test_faults_of_a_file(tmp_path, name, text, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        source = open_source(write(tmp_path, name, text))
        source[0]
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_broken_gzip(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "a.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        open_source(tmp_path / "folder.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="broken gzip"):
        open_source(tmp_path / "cut.jsonl.gz")


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
