"""Data quality: planted faults are found, each with its reason; sound examples stay; the order does not matter."""

import concurrent.futures
import dataclasses
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data.formats import parse
from jaxpost.data.quality import Look, select, write
from jaxpost.data.quality.filters import script_of
from jaxpost.data.quality.texts import ngrams, normal, texts_of, words
from jaxpost.data.sources import open_source
from jaxpost.errors import DataError
from jaxpost.keys import QualityConfig
from jaxpost.types import Origin
from tests.shared import SHARED, needs_shared

QUESTION = "Which river flows through the city of Paris, and how long is it from its source to the sea?"
ANSWER = "The Seine flows through Paris; from its source near Dijon to the sea at Le Havre it is 777 km long."
CHAT = [{"role": "user", "content": "Who wrote Emma?"}, {"role": "assistant", "content": "Jane Austen."}]


def example(record, line=1):
    return parse(record, Origin("data.jsonl", line))


def pair(prompt=QUESTION, completion=ANSWER):
    return {"prompt": prompt, "completion": completion}


def reasons(records, **options):
    """[(line, reason), ...] of what is removed."""
    kept, removals = select([example(r, n) for n, r in enumerate(records, 1)], QualityConfig(**options))
    lines = [(removal.origin.line, removal.reason) for removal in removals]
    assert kept.tolist() == [n not in dict(lines) for n in range(1, len(records) + 1)]
    return lines


# --- the words of an example ------------------------------------------------------------------------------------------


def test_prompt_and_answers_of_every_kind():
    def said(record):
        texts = texts_of(example(record))
        return texts.prompt, texts.answers, texts.wanted, texts.whole

    assert said(pair("a", "b")) == ("a", ("b",), ("b",), "a\nb")
    assert said({"text": "b"}) == (None, ("b",), ("b",), "b")
    system = {"role": "system", "content": "Be brief."}
    chat = said({"messages": [system, *CHAT, {"role": "user", "content": "When?"}, CHAT[1]]})
    assert chat[:2] == ("Who wrote Emma?\nWhen?", ("Jane Austen.\nJane Austen.",))
    assert chat[3].split("\n")[0] == "Be brief."
    preference = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert said(preference) == ("a", ("b", "c"), ("b",), "a\nb\nc")
    assert said({"prompt": "a", "completion": "b", "label": False})[1:3] == (("b",), ())
    assert said({"prompt": "a", "completion": "b", "label": True})[1:3] == (("b",), ("b",))


def test_words_and_runs():
    assert normal("  Ｔhe\n\tSTRASSE ") == "the strasse" == normal("the Straße")
    assert words("It's 3.5 km -- isn't it?") == ["it", "s", "3", "5", "km", "isn", "t", "it"]
    assert words("我爱 Paris") == ["我", "爱", "paris"]
    assert ngrams(["a", "b", "c"], 2) == ["a b", "b c"] and ngrams(["a"], 2) == []


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, inside, outside, reason",
    [
        ({"prompt_characters": (2, 4)}, ["ab", "abcd"], ["a", "abcde"], "prompt_length"),
        ({"prompt_words": (2, 3)}, ["a b", "a, b. c!"], ["a", "a b c d"], "prompt_length"),
    ],
)
def test_lengths_of_prompts(options, inside, outside, reason):
    found = reasons([pair(prompt) for prompt in (*inside, *outside)], **options)
    assert found == [(3, reason), (4, reason)]
    assert reasons([{"text": "a b c d e f"}], **options) == []  # it has no prompt


def test_lengths_of_answers():
    both = [
        {"prompt": "?", "chosen": "a b", "rejected": rejected} for rejected in ("a b c", "a b c d", "a " * 99 + "b")
    ]
    assert reasons(both, answer_words=(2, 3)) == [(2, "answer_length"), (3, "answer_length")]
    assert reasons([pair("?", "a" * n) for n in (4, 5, 6)], answer_characters=(5, 5)) == [
        (1, "answer_length"),
        (3, "answer_length"),
    ]


def test_scripts():
    scripts = {
        "a": "Latin",
        "é": "Latin",
        "ж": "Cyrillic",
        "λ": "Greek",
        "漢": "Han",
        "ひ": "Hiragana",
        "ア": "Katakana",
    }
    scripts |= {
        "ｱ": "Katakana",
        "Ａ": "Latin",
        "한": "Hangul",
        "ا": "Arabic",
        "א": "Hebrew",
        "ก": "Thai",
        "अ": "Devanagari",
    }
    assert {letter: script_of(letter) for letter in scripts} == scripts
    assert [script_of(letter) for letter in "1 .,😀"] == [None] * 5
    records = [
        pair("Hallo", "Größe 123"),
        pair("Привет", "мир"),
        pair("a" * 9, "ж"),
        pair("a" * 8, "жж"),
        pair("1", "2"),
    ]
    assert reasons(records, scripts=("Latin",)) == [(2, "script"), (4, "script")]
    assert reasons(records, scripts=("Latin", "Cyrillic")) == []
    assert reasons(records, scripts=("Latin",), script_share=0.8) == [(2, "script")]


def test_refusals():
    refusals = [
        "I'm sorry, but I cannot do that.",
        "I’M SORRY, BUT no",
        "Well, as an AI language model I have no views.",
    ]
    sound = ["The Seine.", "It serves as an aide.", "x" * 250 + " I'm sorry, but", "She said sorry."]
    assert reasons([pair(completion=c) for c in (*refusals, *sound)], drop_refusals=True) == [
        (n, "refusal") for n in (1, 2, 3)
    ]
    assert reasons([pair("As an AI, what are you?", "A program.")], drop_refusals=True) == []
    chosen, rejected = (
        {"prompt": "?", "chosen": a, "rejected": b} for a, b in ((refusals[0], "No"), ("No", refusals[0]))
    )
    assert reasons([chosen, rejected], drop_refusals=True) == [(1, "refusal")]
    extended = [pair(completion="My Lips are  sealed!"), pair()]
    assert reasons(extended, drop_refusals=True, refusal_phrases=("my lips are sealed",)) == [(1, "refusal")]


def test_patterns():
    records = [pair("see http://a.b", "c"), pair("x", "see HTTPS://a.b"), pair("x", "Answer: 5")]
    assert reasons(records, drop_matching=(r"(?i)https?://", "zzz")) == [(n, "matches_pattern") for n in (1, 2)]
    assert reasons(records, keep_matching=(r"Answer: \d", "^see http:")) == [(2, "lacks_pattern")]
    _, (removal,) = select([example(records[0])], QualityConfig(drop_matching=("http.*",)))
    assert removal.detail == {"pattern": "http.*", "match": "http://a.b"}


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_exact_duplicates():
    records = [
        pair(),
        pair(QUESTION.upper(), f" {ANSWER}\n"),  # equal but for case and spaces
        pair(completion=ANSWER + " Indeed."),
        pair("Other", ANSWER),
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        pair(QUESTION + ANSWER, "."),
        pair(),
    ]
    assert reasons(records, exact_duplicates=True) == [(2, "exact_duplicate"), (7, "exact_duplicate")]
    _, removals = select([example(r, n) for n, r in enumerate(records, 1)], QualityConfig(exact_duplicates=True))
    assert [removal.detail for removal in removals] == [{"kept": "data.jsonl:1"}] * 2


def test_what_is_trained_the_other_way_is_no_duplicate():
    one = {
        "prompt": QUESTION,
        "chosen": ANSWER,
        "rejected": "I do not know, sorry; perhaps you might ask someone else.",
    }
    swapped = one | {"chosen": one["rejected"], "rejected": one["chosen"]}
    good, bad = ({"prompt": "?", "completion": ANSWER, "label": label} for label in (True, False))
    call = {"role": "assistant", "content": ""}
    calls = [
        {"messages": [CHAT[0], call | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": x}}}]}]}
        for x in ("one", "two")
    ]
    for records in ([one, swapped], [good, bad], calls):
        assert reasons(records, exact_duplicates=True, near_duplicates=0.6) == []
        assert len(reasons([*records, *records], exact_duplicates=True, near_duplicates=0.6)) == 2


def variants(generator, changes, length=60):
    """A random text of this many words, and the same with some words changed; with the true similarity of both."""
    text = [f"w{generator.randrange(10**6)}" for _ in range(length)]
    other = list(text)
    for place in generator.sample(range(length), changes):
        other[place] = f"v{generator.randrange(10**6)}"
    one, two = (set(ngrams(t, 5)) for t in (text, other))
    return " ".join(text), " ".join(other), len(one & two) / len(one | two)


def test_near_duplicates_are_those_above_the_threshold():
    """Of 80 planted pairs, by their true Jaccard similarity: all well above are found, none well below."""
    generator = random.Random(0)
    found = {"above": [], "below": [], "near": []}
    records, where = [], []
    for n in range(80):
        text, other, similarity = variants(generator, changes=n % 8)
        where.append("above" if similarity > 0.85 else "below" if similarity < 0.45 else "near")
        records += [{"text": text}, {"text": other}]
    removed = {(line - 1) // 2 for line, _ in reasons(records, near_duplicates=0.65, near_permutations=256)}
    for n, kind in enumerate(where):
        found[kind].append(n in removed)
    assert len(found["above"]) >= 10 and all(found["above"])
    assert len(found["below"]) >= 10 and not any(found["below"])


def test_the_longest_is_kept_and_named():
    generator = random.Random(1)
    text, other, similarity = variants(generator, 2, length=200)
    examples = [
        example({"text": t}, n) for n, t in enumerate((text, "Nothing like it at all.", other + " and more"), 1)
    ]
    kept, (removal,) = select(examples, QualityConfig(near_duplicates=0.7))
    assert kept.tolist() == [False, True, True] and removal.reason == "near_duplicate"
    assert removal.detail["kept"] == "data.jsonl:3" and removal.detail["similarity"] == pytest.approx(
        similarity, abs=0.1
    )


def test_texts_without_a_word_or_of_few():
    records = [pair("!", "?"), pair("?!", "..."), pair("Hi", "Ho"), pair("Hi", "Ho!"), pair("Hi", "No")]
    assert reasons(records, near_duplicates=0.9) == [(3, "near_duplicate")]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=7).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_kept_texts_do_not_depend_on_the_order(records, generator):
    options = QualityConfig(
        exact_duplicates=True, near_duplicates=0.5, near_ngram=2, near_permutations=32, answer_words=(2, 6)
    )

    def kept(records):
        examples = [example(pair(*record)) for record in records]
        mask, removals = select(examples, options)
        assert len(removals) + mask.sum() == len(records)
        return sorted(record for record, keep in zip(records, mask, strict=True) if keep)

    shuffled = generator.sample(records, len(records))
    assert kept(records) == kept(shuffled)
    assert len(set(kept(records))) == len(kept(records))


# --- decontamination --------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(write_jsonl):
    return str(write_jsonl(pair("Who wrote the novel Emma?", "It was Jane Austen."), pair(), name="evaluation.jsonl"))


def test_contaminated_examples(evaluation):
    first, last = QUESTION.split()[:12], QUESTION.split()[-9:]
    records = [
        pair("Please tell me: " + QUESTION.upper(), "No idea."),  # the whole question
        pair(" ".join(first), "The first twelve of nineteen words: 5 of 12 runs."),
        pair(" ".join(last), "The last nine words: 2 of 12 runs."),
        pair("Something else altogether, which is as long as that?", ANSWER),  # the answer
        pair(" ".join(reversed(QUESTION.split())), "The same words."),
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I like to swim."}]},
    ]
    found = [n for n, _ in reasons(records, decontaminate=(evaluation,))]
    assert found == [1, 4]
    assert [n for n, _ in reasons(records, decontaminate=(evaluation,), decontaminate_share=0.4)] == [1, 2, 4]
    assert [n for n, _ in reasons(records, decontaminate=(evaluation,), decontaminate_share=0.0)] == [1, 2, 3, 4]
    _, removals = select([example(r, n) for n, r in enumerate(records, 1)], QualityConfig(decontaminate=(evaluation,)))
    run = "which river flows through the city of paris"
    assert removals[0].detail == {"evaluation": f"{evaluation}:2", "ngram": run, "share": 1.0}


def test_short_evaluation_texts(write_jsonl):
    """A text below n words must be one of its own; one of a word or two says nothing."""
    path = str(write_jsonl(pair("Who wrote the novel Emma?", "Yes."), name="short.jsonl"))
    records = [pair("Who wrote the novel EMMA", "Jane."), pair("And who wrote the novel Emma?", "x"), pair("x", "Yes.")]
    assert reasons(records, decontaminate=(path,)) == [(1, "contaminated")]


def test_evaluation_files_of_no_known_format(write_jsonl, caplog):
    path = str(write_jsonl({"task": {"stem": QUESTION, "choices": ["a", "b"]}, "n": 5}, name="odd.jsonl"))
    with caplog.at_level("INFO", "jaxpost"):
        assert reasons([pair(), pair("Something else")], decontaminate=(path,)) == [(1, "contaminated")]
    assert "odd.jsonl: none of the known formats" in caplog.text
    with pytest.raises(DataError, match="no such file"):
        reasons([pair()], decontaminate=("absent.jsonl",))


# --- all together -----------------------------------------------------------------------------------------------------


def test_off_by_default():
    assert not QualityConfig().on and reasons([pair(), pair()]) == []
    changes = {"answer_words": (1, 2), "scripts": ("Latin",), "drop_refusals": True, "drop_matching": ("a",)}
    changes |= {"keep_matching": ("a",), "decontaminate": ("a",), "exact_duplicates": True, "near_duplicates": 0.5}
    assert all(QualityConfig(**{name: value}).on for name, value in changes.items())


EVERYTHING = {"answer_words": (3, 50), "drop_refusals": True, "exact_duplicates": True, "near_duplicates": 0.7}


def test_workers_do_not_change_the_result(evaluation, tmp_path):
    generator = random.Random(2)
    records = [pair(completion=ANSWER + f" {n % 3}") for n in range(6)] + [pair("?", "No."), pair("?", "As an AI, no.")]
    records += [{"prompt": "?", "completion": variants(generator, 1, 40)[0]} for _ in range(4)]
    examples = [example(r, n) for n, r in enumerate(records * 2, 1)]
    options = QualityConfig(**EVERYTHING, decontaminate=(evaluation,))
    alone = select(examples, options)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = select(examples, options, map=pool.map)
    assert alone[0].tolist() == together[0].tolist() and alone[1] == together[1]
    assert {removal.reason for removal in alone[1]} == {"contaminated", "answer_length", "refusal", "exact_duplicate"}
    write(alone[1], tmp_path / "removed.jsonl")
    source = open_source(tmp_path / "removed.jsonl")
    lines = [source[n][0] for n in range(len(source))]
    assert [line["line"] for line in lines] == sorted(line["line"] for line in lines) and len(lines) == len(alone[1])
    assert lines[0] == {"path": "data.jsonl", "line": 1, "reason": "contaminated", **alone[1][0].detail}


def test_what_one_example_shows_can_be_found_elsewhere():
    """In another process: settings, look and result can be pickled."""
    import pickle

    look = pickle.loads(pickle.dumps(Look(QualityConfig(near_duplicates=0.5, drop_matching=("x",)), None)))
    found = pickle.loads(pickle.dumps(look(example(pair()))))
    direct = Look(QualityConfig(near_duplicates=0.5), None)(example(pair()))
    assert (found.digest, found.minhash.tolist()) == (direct.digest, direct.minhash.tolist())


def test_the_absent_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(DataError, match=r"data.quality.near_duplicates needs the package datasketch: .*\[quality\]"):
        reasons([pair()], near_duplicates=0.5)


# --- real data --------------------------------------------------------------------------------------------------------


def real(name, **options):
    source = open_source(SHARED / "data" / name)
    examples, faults = [], 0
    for n in range(len(source)):
        try:
            examples.append(parse(*source[n]))
        except DataError:
            faults += 1
    return select(examples, QualityConfig(**options))


@needs_shared
def test_gsm8k_train_holds_no_question_of_its_test_set():
    """But a planted one is found among them."""
    test = str(SHARED / "data/gsm8k/test.jsonl")
    kept, removals = real("gsm8k/train.jsonl", decontaminate=(test,))
    assert len(kept) > 1000 and len(removals) == 0
    record, origin = open_source(test)[7]
    kept, (removal,) = select(
        [parse(record, dataclasses.replace(origin, path="x"))], QualityConfig(decontaminate=(test,))
    )
    assert removal.detail["evaluation"] == str(origin) and removal.detail["share"] == 1.0


@needs_shared
def test_exact_duplicates_of_real_data():
    """By a loop over all pairs of records; and planted ones."""
    source = open_source(SHARED / "data/llamafactory_demo/dpo_en_demo.json")
    records = [source[n][0] for n in range(len(source))]
    plain = [json.dumps(record).casefold() for record in records]
    expected = [(n + 1, "exact_duplicate") for n in range(len(plain)) if plain[n] in plain[:n]]
    assert reasons(records, exact_duplicates=True) == expected and len(expected) == 5
    planted = [json.loads(json.dumps(record).replace(" the ", "  the ")) for record in records[:9]]
    found = reasons(records + planted, exact_duplicates=True)
    assert found == expected + [(301 + n, "exact_duplicate") for n in range(9)]


@needs_shared
def test_near_duplicates_of_real_data():
    """By the true similarity of all pairs: no two that are kept are alike, and what is removed is like what is kept."""
    path = SHARED / "data/llamafactory_demo/glaive_toolcall_en_demo.json"
    source = open_source(path)
    examples = [parse(*source[n]) for n in range(len(source))]
    sets = [
        {g for _, text in texts_of(e).parts for g in ngrams(words(text), min(5, len(words(text))))} for e in examples
    ]
    kept, removals = select(examples, QualityConfig(near_duplicates=0.7, near_permutations=256))
    left = [n for n in range(len(kept)) if kept[n]]
    similarity = lambda a, b: len(sets[a] & sets[b]) / len(sets[a] | sets[b])  # noqa: E731
    assert max(similarity(a, b) for a, b in itertools.combinations(left, 2)) < 0.8
    assert len(removals) >= 34
    for removal in removals:
        other = int(removal.detail["kept"].rpartition(":")[2]) - 1
        assert kept[other]
        assert similarity(removal.origin.line - 1, other) == pytest.approx(removal.detail["similarity"], abs=0.15)
