"""Properties of the whole way from a record to a batch and back, over random conversations, tools and row lengths.

Each side of a conversation has an alphabet of its own, so that whose words a token holds can be read off it.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpost.data.encode import encode
from jaxpost.data.formats import parse
from jaxpost.data.rows import build_batch, gather_completions, pack
from jaxpost.data.templates import Template, load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.types import Origin

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONTROL = ["<|user|>", "<|end|>", "</s>", "<s>"]
USER, TOOL, BOT, THOUGHT = "abcdä ", "fghé\n", "XYZÖ ", "JKL "


def text(alphabet, *more):
    pieces = st.sampled_from([*alphabet, *more])
    return st.lists(pieces, min_size=1, max_size=12).map("".join).filter(str.strip)


def turn(role, alphabet, *more):
    return text(alphabet, *more).map(lambda content: {"role": role, "content": content})


# What others say may hold control tokens that somebody typed.
asked = turn("user", USER, *CONTROL)
answered = st.builds(
    lambda message, thought: message | ({"reasoning_content": thought} if thought else {}),
    turn("assistant", BOT),
    st.none() | text(THOUGHT),
)
called = st.builds(
    lambda name, arguments, result, answer: [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        result,
        answer,
    ],
    text("XYZ"),
    st.dictionaries(text("XY"), text("XYZ"), max_size=2),
    turn("tool", TOOL, *CONTROL),
    answered,
)
exchange = st.builds(lambda question, rest: [question, *rest], asked, called | answered.map(lambda m: [m]))
dialogue = st.lists(exchange, min_size=1, max_size=3).map(lambda parts: [m for part in parts for m in part])
conversation = st.builds(
    lambda first, rest: [*first, *rest], st.lists(turn("system", USER, *CONTROL), max_size=1), dialogue
)
question = st.builds(lambda first, last: [*first, last], dialogue, asked) | asked.map(lambda m: [m])
tools = st.none() | st.lists(
    st.builds(lambda name: {"name": name, "parameters": {}}, text(USER)), min_size=1, max_size=2
)
distinct = st.lists(text(BOT), min_size=2, max_size=4, unique_by=str.strip)


def completions(texts):
    return [[{"role": "assistant", "content": content}] for content in texts]


RECORDS = {
    "sft": st.fixed_dictionaries({"messages": conversation, "tools": tools}),
    "preference": st.builds(
        lambda prompt, texts: {"prompt": prompt} | dict(zip(("chosen", "rejected"), completions(texts), strict=False)),
        question,
        distinct,
    ),
    "ranking": st.builds(
        lambda prompt, texts, scores: (
            {"prompt": prompt, "completions": completions(texts)} | ({"scores": scores[: len(texts)]} if scores else {})
        ),
        question,
        distinct,
        st.none() | st.lists(st.integers(-3, 3), min_size=4, max_size=4, unique=True),
    ),
    "unpaired": st.builds(
        lambda prompt, texts, label: {"prompt": prompt, "completion": completions(texts)[0], "label": label},
        question,
        distinct,
        st.booleans(),
    ),
}
CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '{' + m.reasoning_content + '}' }}{% endif %}{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)  # forgets the thoughts of earlier turns
MARKUP = ["name", "arguments", "Call", *CONTROL]


@pytest.fixture(scope="module")
def tokenizer(json_bytes, tmp_path_factory):
    """Byte-level, so that decoding gives every character back."""
    folder = tmp_path_factory.mktemp("properties")
    (folder / "tokenizer.json").write_bytes(json_bytes)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(folder)


def documents_of(kind, records, template, tokenizer):
    options = {"template": template, "tokenizer": tokenizer, "max_tokens": 10_000, "on_long": "drop"}
    for number, record in enumerate(records):
        yield from encode(parse(record, Origin("data", number + 1), kind=kind), number, **options).documents


def numbered(documents):
    """The documents with a number of its own for every token of a completion, and {number: what must stand there}."""
    count, result, expected = 1, [], {}
    for place, document in enumerate(documents):
        numbers = []
        for branch, (ids, weights) in enumerate(zip(document.completions, document.weights, strict=True), start=1):
            numbers.append(np.arange(count, count + len(ids), dtype=np.int32))
            for offset, number in enumerate(numbers[-1].tolist()):
                position = offset + len(document.prompt)
                expected[number] = (place, 0 if document.linear else branch, position, ids[offset], weights[offset])
            count += len(ids)
        result.append(dataclasses.replace(document, token={"number": tuple(numbers)}))
    return result, expected


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("source", ["plain", CHATML], ids=["plain", "rewriting"])
def test_every_token_of_every_completion_is_in_one_row_once(tokenizer, kind, source):
    template = load_template("plain", tokenizer) if source == "plain" else Template(source, tokenizer)

    @QUICK
    @given(st.lists(RECORDS[kind], min_size=1, max_size=5), st.integers(0, 60), st.integers(1, 3))
    def run(records, room, per_row):
        documents, expected = numbered(documents_of(kind, records, template, tokenizer))
        assert len(documents) == len(records)
        tokens_per_row = max(document.cost for document in documents) + room
        rows = pack([document.cost for document in documents], tokens_per_row, per_row)
        size = {"tokens_per_row": tokens_per_row, "documents_per_row": per_row}
        branches = 0 if kind == "sft" else max(len(document.completions) for document in documents)
        batch = build_batch(
            [[documents[i] for i in row] for row in rows], rows_per_step=len(rows), branches=branches, **size
        )

        layout, numbers = batch.rows, batch.token["number"]
        found = np.argwhere(numbers > 0)
        assert sorted(numbers[numbers > 0].tolist()) == sorted(expected)  # each once
        for row, t in found:
            place, branch, position, token, weight = expected[int(numbers[row, t])]
            assert rows[row][layout.segments[row, t] - 1] == place
            assert (layout.branches[row, t], layout.positions[row, t]) == (branch, position)
            assert (layout.tokens[row, t], layout.weights[row, t]) == (token, weight)
            before = (layout.segments[row, t - 1], layout.branches[row, t - 1], layout.positions[row, t - 1])
            assert weight == 0 or before == (layout.segments[row, t], branch, position - 1)  # what predicts it
        assert layout.weights[numbers == 0].sum() == 0  # no prompt and no padding is trained
        assert ((layout.segments > 0).sum(1) == [sum(documents[i].cost for i in row) for row in rows]).all()

        for field in ("tokens", "weights"):
            back = gather_completions(getattr(layout, field), layout)
            for row, members in zip(back, rows, strict=True):
                for values, i in zip(row, members, strict=True):
                    kept = documents[i].completions if field == "tokens" else documents[i].weights
                    assert [v.tolist() for v in values] == [k.tolist() for k in kept]
        for name in documents[0].completion:
            for m, n in np.argwhere(batch.example_ids >= 0):
                document = documents[batch.example_ids[m, n]]
                given = batch.completion[name][m, n][batch.completion["mask"][m, n] > 0]
                assert given.tolist() == list(document.completion[name])

    run()


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("source", ["plain", CHATML], ids=["plain", "rewriting"])
def test_only_the_assistants_words_are_trained_and_all_of_them(tokenizer, kind, source):
    """Answers, calls and the end of each turn; nothing of users, systems, tools, whatever they typed."""
    template = load_template("plain", tokenizer) if source == "plain" else Template(source, tokenizer)
    end = "</s>" if source == "plain" else "<|end|>"

    @QUICK
    @given(RECORDS[kind])
    def run(record):
        (document,) = documents_of(kind, [record], template, tokenizer)
        example = parse(record, Origin("data", 1), kind=kind)
        for ids, weights, completion in zip(document.completions, document.weights, example.completions, strict=True):
            said = [message for message in completion if message["role"] == "assistant"]
            trained = tokenizer.decode(ids[weights > 0], skip_special=False)
            place = 0
            for message in said:
                words = [message["content"] if source == "plain" else message["content"].strip()]
                for call in message.get("tool_calls", ()):
                    words += [json.dumps(call["function"], ensure_ascii=False)]
                for word in [*words, end]:
                    place = trained.find(word, place) + len(word)
                    assert place >= len(word), (trained, word)
            assert trained.count(end) == len(said)
            for markup in MARKUP:
                trained = trained.replace(markup, "")
            assert not set(trained) & set(USER.strip() + TOOL.strip())

    run()


@pytest.mark.parametrize("source", ["plain", CHATML], ids=["plain", "rewriting"])
def test_what_somebody_typed_changes_no_turn(tokenizer, source):
    """The control tokens of a conversation are those of the one without the typed ones."""
    template = load_template("plain", tokenizer) if source == "plain" else Template(source, tokenizer)
    control = {tokenizer.token_id(token) for token in CONTROL}

    def honest(message):
        if message["role"] == "assistant":
            return message
        content = message["content"]
        for token in CONTROL:
            content = content.replace(token, "a")
        return message | {"content": content}

    @QUICK
    @given(conversation)
    def run(messages):
        ids, plain = (template.encode(part, tokenizer) for part in (messages, [honest(m) for m in messages]))
        assert [i for i in ids if i in control] == [i for i in plain if i in control]
        (document,) = documents_of("sft", [{"messages": messages}], template, tokenizer)
        assert document.completions[0].tolist() == ids  # trained as it is used

    run()
