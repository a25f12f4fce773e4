"""Tokenising by chunks: the same documents from any number of processes, from the cache, and by windows on demand."""

import datetime
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from jaxpost.data import cache as caches
from jaxpost.data import chunks, dataset, documents, sources, workers
from jaxpost.data.chunks import Chunk
from jaxpost.data.dataset import load_dataset
from jaxpost.data.loader import Loader
from jaxpost.data.templates import Template, load_template
from jaxpost.data.workers import Task, Workers
from jaxpost.errors import ConfigError, DataError
from tests.data.test_rows import assert_same

FILLER = "It is a fine day, and the capital of France is Paris. "


def records(count):
    """Questions of several lengths; every seventh has no answer, every eleventh is too long."""
    return [
        {
            "prompt": f"{n}? " * (1 + n % 5),
            "completion": "" if n % 7 == 3 else FILLER * (90 if n % 11 == 5 else 1 + n % 3),
        }
        for n in range(count)
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 16)
    monkeypatch.setattr(dataset, "PIECE", 8)


@pytest.fixture
def load(tokenizer, small_chunks):
    def load(paths, **options):
        template = options.pop("template", None) or load_template("plain", tokenizer)
        return load_dataset(
            paths, **{"tokenizer": tokenizer, "template": template, "kind": "sft", "max_tokens": 400, **options}
        )

    return load


@pytest.fixture
def files(write_jsonl):
    texts = [{"text": FILLER * (1 + 9 * (n % 4 == 2))} for n in range(30)]
    return [(write_jsonl(*records(70), name="a.jsonl"), 1.5), (write_jsonl(*texts, name="b.jsonl"), 0.5)]


def batches(found, steps=25, **options):
    shape = {"rows_per_step": 2, "tokens_per_row": 400, "documents_per_row": 6, "branches": 0}
    loader = Loader(found, **shape, seed=3, window=32, **options)
    return [loader.batch(step) for step in range(steps)]


def all_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def described(found):
    return [(d.example_id, str(d.origin), d.transform, d.completions[0].tolist()) for d in found]


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_a_chunk_survives_packing(load, files):
    made = load(files).documents._chunks[-1]
    again = Chunk.unpack(made.pack())
    assert again.digest == made.digest and again.faults == made.faults
    for d in range(len(made.lines)):
        one, other = made.document(d, d), again.document(d, d)
        assert described([one]) == described([other]) and one.weights[0].tolist() == other.weights[0].tolist()
    content = bytearray(made.pack())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), made.pack()[:-9], b"", b"no such thing"):
        with pytest.raises(ValueError, match="not a whole chunk"):
            Chunk.unpack(damaged)


def test_values_that_documents_carry_pass_through_a_chunk():
    """Scores of completions and per-token values, with a weight that is no whole number."""
    from jaxpost.types import Document, Origin

    made = [
        Document(
            prompt=np.arange(300 + n, dtype=np.int32),
            completions=(np.array([70_000, 5], np.int32), np.array([4], np.int32)),
            weights=(np.array([0.25, 1], np.float32), np.array([1], np.float32)),
            example_id=n,
            origin=Origin(f"{n}.jsonl", 10**10),
            token={"logps": (np.array([-1.5, -2], np.float32), np.array([-3], np.float32))},
            completion={"score": (0.5, float(n))},
            transform=f"piece {n}",
        )
        for n in range(3)
    ]
    chunk = Chunk.unpack(chunks._join([made[:2], [], made[2:]], [False] * 3, []).pack())
    for n, expected in enumerate(made):
        found = chunk.document(n, n)
        assert found.prompt.tolist() == expected.prompt.tolist() and found.origin == expected.origin
        for name in ("completions", "weights"):
            assert [x.tolist() for x in getattr(found, name)] == [x.tolist() for x in getattr(expected, name)]
            assert [x.dtype for x in getattr(found, name)] == [x.dtype for x in getattr(expected, name)]
        assert [x.tolist() for x in found.token["logps"]] == [[-1.5, -2], [-3]]
        assert (found.completion, found.transform) == (expected.completion, expected.transform)
    assert chunk.costs.tolist() == [d.cost for d in made] and chunk.trained.tolist() == [3, 3, 3]


# --- processes --------------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same(load, files):
    alone = load(files, workers=0)
    found = load(files, workers=2)
    assert found.fingerprint == alone.fingerprint and str(found.report) == str(alone.report)
    assert described(found.documents) == described(alone.documents)
    all_same(batches(found.documents), batches(alone.documents))


@pytest.mark.parametrize("worth, started", [(-1.0, True), (60.0, False)])
def test_others_are_started_where_the_work_left_is_worth_it(load, files, monkeypatch, worth, started):
    pools = []
    monkeypatch.setattr(dataset, "cores", lambda: 2)
    monkeypatch.setattr(dataset, "WORTH_SECONDS", worth)
    monkeypatch.setattr(dataset, "Workers", lambda *given: pools.append(given) or Workers(*given))
    assert load(files, workers=None).fingerprint == load(files).fingerprint
    assert [count for count, _ in pools] == [2] * started


def test_a_bar_shows_how_far_it_is(load, files, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(dataset, "Console", lambda: Console(file=shown, force_terminal=True, width=100))
    load(files)
    assert "tokenising" in shown.getvalue() and "100/100" in shown.getvalue()


def test_faults_come_in_order_from_workers_too(load, write_jsonl):
    """The first fault of the file, though a later chunk may be done before; file faults are errors as ever."""
    path = write_jsonl(*records(70))
    with pytest.raises(DataError, match=r":4: a completion is empty \(empty_completion\)"):
        load(path, workers=2, on_bad="error")
    lines = pathlib.Path(path).read_text().splitlines()
    lines[40] = json.dumps({"text": "x"})
    pathlib.Path(path).write_text("\n".join(lines))
    with pytest.raises(DataError, match=r":41: the record has the keys of format text"):
        load(path, workers=2)


def test_a_script_without_a_guard_may_use_workers(write_jsonl, write_tokenizer, tmp_path):
    """multiprocessing's spawn would import the script again; so would a notebook's kernel have nothing to import."""
    script = tmp_path / "script.py"
    script.write_text(f"""
from jaxpost.data import dataset
from jaxpost.data.templates import load_template
from jaxpost.data.tokenizers import load_tokenizer
print("once")
dataset.CHUNK = 16
tokenizer = load_tokenizer({str(write_tokenizer())!r})
found = dataset.load_dataset(
    {str(write_jsonl(*records(70)))!r}, tokenizer=tokenizer, template=load_template("plain", tokenizer), kind="sft",
    max_tokens=400, workers=2,
)
print(len(found.documents))
""")
    path = {"PYTHONPATH": str(pathlib.Path(dataset.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script], env=os.environ | path, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("once\n55\n", "")


def test_a_worker_that_dies_is_one_line_and_a_crash_is_told(load, write_jsonl, monkeypatch):
    jobs = load(write_jsonl(*records(5)), tokenize="lazy").documents._encode.__self__._jobs
    pool = Workers(1, jobs)
    assert isinstance(pool.submit(Task(0, np.arange(3))).result(), Chunk)
    with pytest.raises(RuntimeError, match="IndexError"):
        pool.submit(Task(0, np.array([99]))).result()
    (process,) = pool._processes
    process.kill()
    with pytest.raises(DataError, match=r"data\.workers: a tokenising process ended with code -9"):
        pool.submit(Task(0, np.arange(3))).result()
    pool.close()
    assert process.poll() is not None


def test_a_file_that_changes_meanwhile_is_refused(load, write_jsonl):
    path = write_jsonl(*records(5))
    jobs = pickle.loads(pickle.dumps(load(path, tokenize="lazy").documents._encode.__self__._jobs))
    write_jsonl(*records(4))
    with pytest.raises(DataError, match="changed while it was read"):
        workers.Encoder(jobs).encode(Task(0, np.arange(3)))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the examples that are tokenised in this process."""
    count = []
    encode = chunks.encode
    monkeypatch.setattr(chunks, "encode", lambda *args, **options: count.append(1) or encode(*args, **options))
    return count


def test_a_second_reading_comes_from_the_cache(load, files, tmp_path, tokenised):
    first = load(files, cache_dir=tmp_path / "cache")
    assert len(tokenised) == 90  # 10 of the 100 have no answer
    second = load(files, cache_dir=tmp_path / "cache")
    assert len(tokenised) == 90
    assert second.fingerprint == first.fingerprint and str(second.report) == str(first.report)
    all_same(batches(second.documents), batches(first.documents))
    with pytest.raises(DataError, match="a completion is empty"):
        load(files, cache_dir=tmp_path / "cache", on_bad="error")
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:200] + b"\0" * 9 + b[209:]])
def test_a_damaged_chunk_is_made_again(load, write_jsonl, tmp_path, tokenised, caplog, damage):
    path = write_jsonl(*records(70))
    first = load(path, cache_dir=tmp_path / "cache")
    before = len(tokenised)
    files = sorted((tmp_path / "cache").rglob("*.npz"))
    assert [file.name for file in files] == ["0-16.npz", "16-32.npz", "32-48.npz", "48-64.npz", "64-70.npz"]
    files[1].write_bytes(damage(files[1].read_bytes()))
    again = load(path, cache_dir=tmp_path / "cache")
    assert "16-32.npz: not used" in caplog.text and 0 < len(tokenised) - before <= 16
    assert again.fingerprint == first.fingerprint
    assert load(path, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    assert len(tokenised) - before <= 16


def test_the_key_holds_all_that_decides_the_tokens(load, write_jsonl, tmp_path, tokenised, tokenizer, monkeypatch):
    path = write_jsonl(*records(10))

    def made(**options):
        del tokenised[:]
        load(options.pop("path", path), cache_dir=tmp_path / "cache", **options)
        return len(tokenised) > 0

    assert made() and not made()
    assert made(max_tokens=399) and made(on_long="truncate") and made(row_tokens=50)
    assert made(format="prompt_completion")
    assert made(template=Template("{{ messages }}", tokenizer))
    assert made(path=write_jsonl(*records(11)))
    assert not made(on_bad="drop", workers=0)
    monkeypatch.setattr(caches, "code_digest", lambda: "other code")
    assert made(path=write_jsonl(*records(10)))


def test_a_date_is_part_of_the_key_and_a_clock_keeps_nothing(
    load, write_jsonl, tmp_path, tokenised, monkeypatch, tokenizer
):
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Yes"}]}
    path, text = write_jsonl(chat), "{% generation %}{{ messages[1].content }}{% endgeneration %}"

    def made(clock):
        del tokenised[:]
        load(path, cache_dir=tmp_path / "cache", template=Template("{{ " + clock + " }}" + text, tokenizer))
        return bool(tokenised)

    day, clock, computed = "strftime_now('%d %b %Y')", "strftime_now('%H:%M')", "strftime_now('%' + 'H')"
    assert made(day) and not made(day)
    assert made(clock) and made(clock) and made(computed) and made(computed)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return super().today() + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert made(day) and not made(day)
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2


# --- by windows, on demand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2])
def test_lazy_gives_the_batches_of_ahead(load, files, count):
    """Over epochs, from any start, with weights, pieces and dropped examples, in this process and in others."""
    ahead, lazy = load(files).documents, load(files, tokenize="lazy", workers=count).documents
    expected = batches(ahead)
    found = batches(lazy)
    all_same(found, expected)
    shape = {"rows_per_step": 2, "tokens_per_row": 400, "documents_per_row": 6, "branches": 0, "seed": 3, "window": 32}
    plan = json.loads(json.dumps(Loader(ahead, **shape).plan()))
    again = Loader(load(files, tokenize="lazy").documents, **shape, plan=plan)
    with again.iterate(11) as stream:
        assert_same(next(stream), expected[11])
    parts = [again.batch(7, slice(row, row + 1)) for row in range(2)]
    assert [p.rows.tokens[0].tolist() for p in parts] == expected[7].rows.tokens.tolist()
    lazy.close()
    assert_same(batches(lazy, 1)[0], expected[0])  # it begins again where it is asked
    lazy.close()


def test_lazy_reads_what_is_asked_for(load, write_jsonl, tokenised):
    found = load(write_jsonl(*[r for r in records(200) if r["completion"]]), tokenize="lazy").documents
    assert not tokenised
    Loader(found, rows_per_step=1, tokens_per_row=400, documents_per_row=4, branches=0, seed=0, window=20).batch(0)
    found._thread.submit(int).result()  # the window after it is made in the background
    assert len(tokenised) == 40


def test_lazy_counts_faults_once_as_they_are_met(load, files):
    ahead, lazy = load(files), load(files, tokenize="lazy")
    assert "examples read so far  0" in str(lazy.report)
    batches(lazy.documents, 40)
    assert (lazy.report.read, lazy.report.kept) == (85, ahead.report.kept - 15)  # the weight leaves 15 of b out
    assert lazy.report.dropped == ahead.report.dropped and lazy.fingerprint is None
    with pytest.raises(DataError, match="a completion is empty"):
        batches(load(files, tokenize="lazy", on_bad="error").documents, 1)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_held_out_examples_are_the_same_in_both(load, write_jsonl, weight):
    pairs = [(write_jsonl(*records(100)), weight)]
    ahead, lazy = (load(pairs, tokenize=how).documents.hold_out(20, seed=5) for how in ("ahead", "lazy"))
    assert described(ahead[1]) == described(lazy[1]) and len(ahead[1]) == 20
    assert not set(ahead[0].example_ids) & set(ahead[1].example_ids)
    assert len(set(ahead[0].example_ids)) + 20 == load(pairs).report.kept
    all_same(batches(ahead[0]), batches(lazy[0]))
    assert ahead[0].mixture.sizes.tolist() == [80]
    for found in (load(pairs), load(pairs, tokenize="lazy")):
        with pytest.raises(ConfigError, match=r"data\.eval_examples: 99 of 78 examples leave none to train on"):
            found.documents.hold_out(99, seed=5)


def test_samples_and_iteration(load, files):
    for how in ("ahead", "lazy"):
        found = load(files, tokenize=how).documents
        sample = found.sample(5)
        assert 3 <= len(sample) <= 5 and sample[0].example_id == 0
        assert len(found.sample(10**6)) == len(list(found)) == len(load(files).documents)


def test_auto_is_lazy_where_much_is_not_cached(load, files, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LAZY_RECORDS", 100)
    assert isinstance(load(files, tokenize="auto", cache_dir=tmp_path).documents, documents.LazyDocuments)
    load(files, cache_dir=tmp_path)
    assert isinstance(load(files, tokenize="auto", cache_dir=tmp_path).documents, documents.Documents)
    with monkeypatch.context() as patch:
        patch.setattr(sources.lines.JsonLines, "by_blocks", True, raising=False)
        assert isinstance(load(files, tokenize="auto").documents, documents.Documents)
    monkeypatch.setattr(dataset, "LAZY_RECORDS", 101)
    assert isinstance(load(files, tokenize="auto").documents, documents.Documents)


# --- budgets of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 1.0, 2.6])
def test_a_budget_takes_whole_examples_up_to_it(load, write_jsonl, share):
    path, other = write_jsonl(*records(90)), write_jsonl({"text": FILLER}, name="b.jsonl")
    whole = load(path).documents
    costs = dict(zip(whole.example_ids.tolist(), whole.costs.tolist(), strict=True))
    budget = int(share * sum(costs.values()))
    made = load([(path, {"tokens": budget}), (other, 1)])
    found = made.documents
    ids = [example for example in found.example_ids.tolist() if example < 90]
    spent = sum(costs[example] for example in ids)
    assert budget - max(costs.values()) < spent <= budget
    times = np.bincount(ids, minlength=90)[list(costs)]
    assert set(times) <= {int(share), int(share) + 1} and ids == sorted(ids)
    assert load([(path, {"tokens": budget}), (other, 1)]).fingerprint == made.fingerprint
    assert len(found) == len(ids) + 1
    if share < 1:  # drawn without regard to length
        assert abs(np.mean([costs[i] for i in ids]) / np.mean(list(costs.values())) - 1) < 0.25


def test_budgets_that_cannot_be_filled(load, write_jsonl):
    path = write_jsonl(*records(90))
    with pytest.raises(ConfigError, match=r"tokens=3 of .* is less than its first example"):
        load([(path, {"tokens": 3})])
    with pytest.raises(DataError, match="the token budget of a file must be above 0, found 0"):
        load([(path, {"tokens": 0})])
    with pytest.raises(ConfigError, match="'lazy' cannot fill a budget of tokens"):
        load([(path, {"tokens": 100})], tokenize="lazy")
