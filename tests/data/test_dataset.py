"""Datasets: what is kept, dropped and counted, on made-up and on real files; every fault of the input as one line."""

import hashlib
import io
import json
import math
import pathlib

import numpy as np
import pytest
import rich.console

from jaxpost.data.dataset import load_dataset
from jaxpost.data.encode import encode
from jaxpost.data.formats import ExampleFault, parse
from jaxpost.data.report import Report
from jaxpost.data.rows import build_batch
from jaxpost.data.sources import open_source
from jaxpost.data.templates import Template, load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.errors import DataError
from jaxpost.keys import QualityConfig
from tests.shared import SHARED, needs_shared

GOOD = {"prompt": "Who wrote Emma?", "completion": " Jane Austen."}
EMPTY = {"prompt": "Who wrote Emma?", "completion": ""}
PLAIN = {"prompt": "No or yes, or maybe not?", "completion": " Maybe not."}
LONG = {"prompt": "Who wrote Emma?", "completion": " Jane Austen." * 30}
PAIR = {"prompt": "Yes or no?", "chosen": " Yes", "rejected": " No"}


@pytest.fixture
def load(tokenizer):
    """load_dataset with the small tokenizer and short defaults."""

    def load(paths, kind="sft", max_tokens=100, **options):
        template = options.pop("template", None) or load_template("plain", tokenizer)
        return load_dataset(
            paths, **{"tokenizer": tokenizer, **options}, template=template, kind=kind, max_tokens=max_tokens
        )

    return load


def same(one, two):
    return (
        one.prompt.tolist() == two.prompt.tolist()
        and [c.tolist() for c in one.completions] == [c.tolist() for c in two.completions]
        and [w.tolist() for w in one.weights] == [w.tolist() for w in two.weights]
        and (one.example_id, one.origin) == (two.example_id, two.origin)
    )


def test_documents_are_what_encoding_gives(load, tokenizer, write_jsonl):
    records = [GOOD, {"prompt": "No?", "completion": " Yes"}, {"prompt": "A", "completion": " B"}]
    path = write_jsonl(*records)
    dataset = load(path)
    assert len(dataset.documents) == 3 and dataset.names == (str(path),)
    template, source = load_template("plain", tokenizer), open_source(path)
    for index in (2, 0, 1, -1):
        place = index % 3
        example = parse(*source[place])
        (expected,) = encode(
            example, place, template=template, tokenizer=tokenizer, max_tokens=100, on_long="drop"
        ).documents
        assert same(dataset.documents[index], expected)
        assert dataset.documents[index].prompt.dtype == np.int32
        assert dataset.documents[index].weights[0].dtype == np.float32
    assert len(list(dataset.documents)) == 3  # iteration ends


def test_costs_and_counts_of_branching_documents(load, write_jsonl):
    dataset = load(write_jsonl(PAIR, PAIR | {"prompt": "Who?"}), "preference")
    assert dataset.documents.costs.tolist() == [d.cost for d in dataset.documents]
    assert dataset.report.tokens == sum(d.cost for d in dataset.documents)
    assert dataset.report.trained_tokens == sum(int(w.sum()) for d in dataset.documents for w in d.weights)


def test_faults_are_dropped_counted_and_located(load, write_jsonl):
    path = write_jsonl(GOOD, EMPTY, LONG, EMPTY, GOOD, EMPTY, EMPTY)
    report = load(path).report
    assert (report.read, report.kept, report.documents) == (7, 2, 2)
    assert report.dropped == {"empty_completion": 4, "too_long": 1}
    assert [str(fault.origin) for fault in report.origins["empty_completion"]] == [f"{path}:{n}" for n in (2, 4, 6)]
    text = str(report)
    assert "dropped: empty_completion  4 (data.jsonl:2, data.jsonl:4, data.jsonl:6, ...)" in text
    assert "(prompt_completion)" in text and "examples kept" in text
    assert report.table().row_count == len(text.splitlines())


def test_the_table_shows_brackets_of_a_file_name():
    console = rich.console.Console(file=io.StringIO())
    console.print(Report(("part[old].jsonl",), ["text"]).table())
    assert "part[old].jsonl (text)" in console.file.getvalue()


def test_on_bad_error_names_the_example_but_length_is_no_fault(load, write_jsonl):
    assert load(write_jsonl(GOOD, LONG), on_bad="error").report.dropped == {"too_long": 1}
    with pytest.raises(DataError, match=r"data\.jsonl:3: a completion is empty \(empty_completion\)"):
        load(write_jsonl(GOOD, LONG, EMPTY), on_bad="error")
    same_answers = PAIR | {"rejected": " Yes"}
    with pytest.raises(DataError, match=r":2: chosen and rejected are the same"):
        load(write_jsonl(PAIR, same_answers), "preference", on_bad="error")


def test_truncation_is_counted(load, write_jsonl):
    long_prompt = {"prompt": "Who wrote Emma? " * 20, "completion": " Jane Austen."}
    dataset = load(write_jsonl(GOOD, long_prompt, LONG), on_long="truncate")
    assert dataset.report.truncated == 1 and dataset.report.dropped == {"too_long": 1}
    assert dataset.report.percentiles[100] == 100


def test_documents_longer_than_a_row_are_dropped(load, write_jsonl):
    path = write_jsonl(PAIR, PAIR | {"prompt": "Yes or no or maybe?"})
    costs = load(path, "preference").documents.costs
    assert costs[1] > costs[0]
    dataset = load(path, "preference", row_tokens=int(costs[0]))
    assert dataset.report.dropped == {"longer_than_row": 1} and dataset.documents.costs.tolist() == [costs[0]]
    assert "but a row holds" in str(dataset.report.origins["longer_than_row"][0])


def test_a_long_text_becomes_several_documents(load, write_jsonl):
    dataset = load(write_jsonl({"text": "Jane Austen wrote it. " * 40}, {"text": "Yes."}), max_tokens=50)
    assert dataset.report.kept == 2 and len(dataset.documents) > 2
    assert {d.example_id for d in dataset.documents} == {0, 1}
    assert max(dataset.documents.costs) == 50


@pytest.mark.parametrize("weight, times", [(1, [1] * 6), (2.0, [2] * 6), (0.5, [0, 1] * 3), (1.5, [1, 2] * 3)])
def test_weights_repeat_and_leave_out_by_index(load, write_jsonl, weight, times):
    first = write_jsonl(*[GOOD | {"prompt": f"{n}?"} for n in range(6)], name="a.jsonl")
    other = write_jsonl(GOOD, name="b.jsonl")
    dataset = load([(first, weight), (other, 1)])
    ids = [d.example_id for d in dataset.documents]
    assert ids == [n for n in range(6) for _ in range(times[n])] + [6]
    assert dataset.names == (str(first), str(other)) and dataset.documents[len(ids) - 1].origin.path == str(other)
    assert dataset.report.kept == 7 and dataset.report.documents == len(ids)


def test_files_of_several_formats_train_together(load, write_jsonl):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    files = [write_jsonl(chat, name="a.jsonl"), str(write_jsonl(GOOD, name="b.jsonl"))]
    report = load(files).report
    assert report.formats == ["messages", "prompt_completion"] and report.kept == 2


def test_the_fingerprint_is_of_the_documents(load, write_jsonl, tokenizer, write_tokenizer):
    path = write_jsonl(GOOD, GOOD | {"prompt": "Yes<user>No?"}, LONG)
    prints = [
        load(data, **options).fingerprint
        for data, options in [
            (path, {}),
            (path, {"max_tokens": 1000}),
            (path, {"tokenizer": load_tokenizer(write_tokenizer(legacy=True))}),
            ([(path, 2)], {}),
            (write_jsonl(GOOD, name="other.jsonl"), {}),
            (
                write_jsonl({"text": GOOD["prompt"] + GOOD["completion"]}, name="all.jsonl"),
                {},
            ),  # the mask alone differs
        ]
    ]
    assert len(set(prints)) == len(prints)
    copy = write_jsonl(GOOD, GOOD | {"prompt": "Yes<user>No?"}, LONG, name="copy.jsonl")
    assert load(copy, max_tokens=99).fingerprint == prints[0]


def test_a_template_that_writes_the_date_changes_the_fingerprint(load, write_jsonl, tokenizer):
    """Reference log-probabilities cached yesterday must not be taken for those of today's tokens."""
    path = write_jsonl({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Yes"}]})
    clock = "{{ strftime_now('%H%M%S%f') }}{% generation %}{{ messages[1].content }}{% endgeneration %}"
    template = Template(clock, tokenizer)
    assert load(path, template=template).fingerprint != load(path, template=template).fingerprint


# --- faults of files ------------------------------------------------------------------------------------------------


def test_data_of_the_other_kind(load, write_jsonl):
    path = write_jsonl(PAIR)
    with pytest.raises(DataError, match="found the format preference, which holds preference data; sft training takes"):
        load(path)
    with pytest.raises(DataError, match="takes preference, dialogue_pair, sharegpt_preference"):
        load(write_jsonl(GOOD), "preference")


def test_nothing_left(load, write_jsonl):
    with pytest.raises(DataError, match=r"nothing left: 2 of 2 examples dropped \(empty_completion 2\); first: .*:1: "):
        load(write_jsonl(EMPTY, EMPTY))
    with pytest.raises(DataError, match="the weights take no example"):
        load([(write_jsonl(GOOD), 0.5)])


def test_a_file_keeps_to_one_format(load, write_jsonl):
    with pytest.raises(DataError, match=r":2: the record has the keys of format text, but the file began with prompt"):
        load(write_jsonl(GOOD, {"text": "x"}))
    assert load(write_jsonl(GOOD), format="prompt_completion").report.kept == 1


def test_a_broken_line_is_an_error_even_when_faults_are_dropped(load, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        load(tmp_path / "a.jsonl", on_bad="drop")


def test_the_example_behind_a_document_is_found_again(load, write_jsonl):
    """Over several files, of which one is taken twice and some examples are dropped."""
    other = {"messages": [{"role": "user", "content": "No?"}, {"role": "assistant", "content": "Yes"}]}
    first = write_jsonl(GOOD, EMPTY, GOOD | {"prompt": "And?"}, name="a.jsonl")
    dataset = load([(first, 2), write_jsonl(other, name="b.jsonl")])
    found = [(d.example_id, dataset.example(d.example_id)) for d in dataset.documents]
    assert [example_id for example_id, _ in found] == [0, 0, 2, 2, 3]
    assert [e.origin for _, e in found] == [d.origin for d in dataset.documents]
    assert [e.prompt for _, e in found[:4]] == [GOOD["prompt"]] * 2 + ["And?"] * 2
    assert found[4][1].completions[0][1]["content"] == "Yes"


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
def test_weights_that_mean_nothing(load, write_jsonl, weight):
    with pytest.raises(DataError, match="the weight of a file must be above 0"):
        load([(write_jsonl(GOOD), weight)])
    with pytest.raises(DataError, match="no files given"):
        load([])


def test_on_bad_error_raises_the_fault_itself(load, write_jsonl):
    with pytest.raises(ExampleFault) as fault:
        load(write_jsonl(EMPTY), on_bad="error")
    assert fault.value.reason == "empty_completion"


def test_scores_and_labels_reach_the_batch(load, write_jsonl):
    """Rankings of two and of three (one file of pairs), and unpaired feedback, as packed rows."""
    ranked = {"prompt": "Q", "completions": ["Yes", "No", "Maybe not"], "scores": [0.5, -1, 2]}
    pair = {"prompt": "Q", "chosen": "Paris", "rejected": "Emma"}
    files = [write_jsonl(ranked, name="ranked.jsonl"), write_jsonl(pair, name="pairs.jsonl")]
    dataset = load(files, kind="ranking")
    assert dataset.report.formats == ["ranking", "preference"]
    assert [dataset.example(i).kind for i in (0, 1)] == ["ranking", "ranking"]
    size = {"rows_per_step": 1, "tokens_per_row": 64, "documents_per_row": 2}
    batch = build_batch([list(dataset.documents)], **size, branches=3)
    assert batch.completion["score"].tolist() == [[[2, 0.5, -1], [1, 0, 0]]]
    assert batch.completion["mask"].tolist() == [[[1, 1, 1], [1, 1, 0]]]

    feedback = [{"prompt": "Q", "completion": "Yes", "label": label} for label in (False, True)]
    dataset = load(write_jsonl(*feedback), kind="unpaired")
    batch = build_batch([list(dataset.documents)], **size, branches=1)
    assert batch.completion["label"].tolist() == [[[0], [1]]] and batch.completion["mask"].all()
    flipped = load(write_jsonl(*reversed(feedback)), kind="unpaired")
    assert flipped.fingerprint != dataset.fingerprint


def test_prompts_load_without_completions(load, write_jsonl):
    (document,) = load(write_jsonl({"prompt": "Who wrote Emma?"}), kind="prompt").documents
    assert len(document.prompt) > 1 and document.completions == () and document.completion == {}


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """real(path, kind, max_tokens) with the tokenizer of stories260K, which has no chat template."""
    tokenizer = load_tokenizer(SHARED / "models/stories260K")
    template = load_template("plain", tokenizer)

    def load(path, kind, max_tokens, **options):
        return load_dataset(
            SHARED / "data" / path, tokenizer=tokenizer, template=template, kind=kind, max_tokens=max_tokens,
            **options,
        )  # fmt: skip

    return load


@needs_shared
def test_real_dialogues_of_hh_rlhf(real):
    """3 empty completions, 4 pairs whose prompts differ at the end, 30 % beyond the model's context of 512."""
    dataset = real("hh_rlhf/pairs.jsonl.gz", "preference", 512)
    report = dataset.report
    assert report.formats == ["dialogue_pair"]
    assert report.read == 1800 == report.kept + report.dropped.total()
    assert report.dropped == {"empty_completion": 3, "prompts_differ": 4, "too_long": 530}
    assert [fault.origin.line for fault in report.origins["empty_completion"]] == [398, 572, 921]
    assert [fault.origin.line for fault in report.origins["prompts_differ"]] == [844, 857, 1323]
    assert all(len(d.prompt) + max(map(len, d.completions)) <= 512 for d in dataset.documents)
    assert all(d.prompt[0] == 1 and (d.prompt == 1).sum() == 1 for d in dataset.documents)
    assert all(
        c[-1] == 2 and w[-1] == 1 for d in dataset.documents for c, w in zip(d.completions, d.weights, strict=True)
    )


REAL = [
    ("llamafactory_demo/identity.json", "sft", "alpaca", 91),
    ("fastchat_chat/dummy_conversation.json", "sft", "sharegpt", 500),
]
LARGER = [
    ("llamafactory_demo/alpaca_en_demo.json", "sft", "alpaca", 999),
    ("llamafactory_demo/glaive_toolcall_en_demo.json", "sft", "sharegpt", 300),
    ("llamafactory_demo/dpo_en_demo.json", "preference", "sharegpt_preference", 300),
]


@needs_shared
@pytest.mark.parametrize(
    "path, kind, format, count", [*REAL, *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGER)]
)
def test_real_files_lose_nothing_but_to_length(real, path, kind, format, count):
    report = real(path, kind, 1024, on_bad="error").report
    assert report.formats == [format] and report.read == count
    assert set(report.dropped) <= {"too_long"}


@needs_shared
def test_unpaired_feedback_does_not_pass_for_conversations(real):
    with pytest.raises(
        DataError, match="found the format unpaired_messages, which holds unpaired data; sft training takes messages, "
    ):
        real("llamafactory_demo/kto_en_demo.json", "sft", 1024)


@needs_shared
def test_files_that_complete_the_records_are_among_the_inputs(tokenizer):
    answers = SHARED / "data/bfcl/possible_answer"
    path = sorted(answers.iterdir())[0]
    options = {"tokenizer": tokenizer, "template": load_template("plain", tokenizer), "kind": "sft"}
    dataset = load_dataset(path, **options, max_tokens=10**6)
    found = {pathlib.Path(name).resolve(): digest for name, digest in dataset.files.items()}
    files = (path, answers.parent / path.name)
    assert found == {file.resolve(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- data quality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"tokenize": "lazy"}])
def test_what_the_quality_settings_leave_out(load, write_jsonl, options):
    """Exactly the other examples' documents, the removed ones counted by reason, faults still faults."""
    records = [
        GOOD,
        {"prompt": "No?", "completion": " Yes"},
        EMPTY,
        GOOD,
        LONG,
        GOOD,
        {"prompt": "A", "completion": " B"},
    ]
    settings = QualityConfig(exact_duplicates=True, drop_matching=("^A$",))
    first, other = write_jsonl(*records), write_jsonl(GOOD, PLAIN, name="other.jsonl")
    dataset = load([first, other], settings=settings, on_bad="drop", **options)
    found = list(dataset.documents)
    assert [str(d.origin).rpartition("/")[2] for d in found] == ["data.jsonl:1", "data.jsonl:2", "other.jsonl:2"]
    assert [d.example_id for d in found] == [0, 1, 8]
    plain = load([first, other], **options)
    expected = {d.example_id: d for d in plain.documents}
    assert all(same(d, expected[d.example_id]) for d in found)
    report = dataset.report
    assert report.dropped == {"exact_duplicate": 3, "matches_pattern": 1, "empty_completion": 1, "too_long": 1}
    assert (report.read, report.kept) == (9, 3)
    assert [(r.origin.line, r.reason) for r in dataset.removed] == [
        (4, "exact_duplicate"),
        (6, "exact_duplicate"),
        (7, "matches_pattern"),
        (1, "exact_duplicate"),
    ]
    assert "dropped: exact_duplicate" in str(report) and "data.jsonl:4" in str(report)
    for documents in (dataset.documents, plain.documents):
        getattr(documents, "close", lambda: None)()


def test_quality_settings_are_no_faults_and_count_in_budgets(load, write_jsonl):
    path = write_jsonl(GOOD, GOOD, PLAIN)
    settings = QualityConfig(exact_duplicates=True)
    dataset = load(path, settings=settings, on_bad="error")
    tokens = [d.cost for d in dataset.documents]
    assert len(tokens) == 2
    budget = load([(path, {"tokens": sum(tokens)})], settings=settings)
    assert sorted(d.example_id for d in budget.documents) == [0, 2]


def test_the_cache_of_tokens_knows_nothing_of_quality(load, write_jsonl, tmp_path):
    """The same chunks serve every setting."""
    path = write_jsonl(GOOD, GOOD, PLAIN)
    options = {"cache_dir": tmp_path / "cache"}
    settings = QualityConfig(exact_duplicates=True)
    counts = [len(load(path, settings=s, **options).documents) for s in (settings, None, settings)]
    assert counts == [2, 3, 2] and len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    evaluation = write_jsonl(PLAIN, name="evaluation.jsonl")
    dataset = load(path, settings=QualityConfig(decontaminate=(str(evaluation),), decontaminate_ngram=3), **options)
    assert [source.path for source in dataset.compared] == [str(evaluation)]
    assert dataset.report.dropped == {"contaminated": 1}


def test_documents_of_many_files_name_their_own(load, write_jsonl):
    first = write_jsonl(GOOD, PLAIN, name="a.jsonl")
    write_jsonl(GOOD, name="b.jsonl")
    dataset = load(str(first.parent / "[ab].jsonl"))
    assert [str(d.origin).rpartition("/")[2] for d in dataset.documents] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
