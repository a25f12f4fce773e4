"""Every template of the collection against `transformers` (golden/make.py): text, prompt, ids and assistant masks."""

import datetime
import hashlib
import json
import pathlib
import types

import pytest

from jaxpost.data import jinja
from jaxpost.data.encode import _tokenize
from jaxpost.data.formats import ExampleFault, parse
from jaxpost.data.templates import load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.types import Origin
from tests.data.golden.conversations import CONVERSATIONS
from tests.shared import SHARED, needs_shared

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "templates.json").read_text())
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "add_bos_token": False}
pytestmark = needs_shared


@pytest.fixture(autouse=True)
def day(monkeypatch):
    """The day that the golden values were made on: some templates write it."""
    now = types.SimpleNamespace(now=lambda: datetime.datetime(2025, 2, 3))
    monkeypatch.setattr(jinja, "datetime", types.SimpleNamespace(datetime=now))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def template(tokenizer):
    return lambda name: load_template(SHARED / f"data/chat_templates/{name}.jinja", tokenizer)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def words(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_every_template_has_golden_values():
    files = (SHARED / "data/chat_templates").glob("*/*.jinja")
    assert {f"{file.parent.name}/{file.stem}" for file in files} == set(EXPECTED)
    assert all(set(row) == set(CONVERSATIONS) for row in EXPECTED.values())


def test_the_conversations_are_as_formats_give_them():
    for messages, tools in CONVERSATIONS.values():
        example = parse({"messages": messages, "tools": tools}, Origin("x", 1))
        assert list(example.completions[0]) == messages
        assert example.prompt.tools == (tuple(tools) if tools else None)


@pytest.mark.parametrize("name", EXPECTED)
def test_text_ids_and_masks_are_those_of_transformers(tokenizer, template, name):
    """A token counts in the mask where our encoding trains it; the first of a sequence never is, nor there."""
    template = template(name)
    for key, expected in EXPECTED[name].items():
        messages, tools = CONVERSATIONS[key]
        if expected == "refused":
            with pytest.raises(ExampleFault):
                template.render(messages, tools)
                template.render(messages[:-1], tools, add_generation_prompt=True)
            continue
        text, ids, mask = expected
        try:
            rendered = template.render(messages, tools)
        except ExampleFault:
            assert (name, key) == ("trl/diffusion_gemma", "tools")  # puts results within the turn that calls
            continue
        prompt = template.render(messages[:-1], tools, add_generation_prompt=True).text
        sequence = _tokenize(rendered, tokenizer)
        assert digest(f"{rendered.text}\0{prompt}") == text, key
        assert digest(sequence.ids.tolist()) == ids == digest(template.encode(messages, tokenizer, tools)), key
        assert mask is None or digest(sequence.trained.astype(int).tolist()) == mask, key
        assert bool(mask) == template.marks_generation


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_whole_texts(template, path):
    name, _, key = path.stem.rpartition("-")
    messages, tools = CONVERSATIONS[key]
    assert template(f"trl/{name}").render(messages, tools).text == path.read_text()


def shown_strings(message, text):
    """What a message says, piece by piece, as far as the template shows it."""
    pieces = [message["content"].rpartition("</think>")[2].strip()]
    for call in message.get("tool_calls", ()):
        values = [str(value) for value in call["function"]["arguments"].values()]
        pieces += [call["function"]["name"], *values] if all(value in text for value in values) else []
    return [piece for piece in pieces if piece in text]


@pytest.mark.parametrize("name", [name for name in EXPECTED if "falcon" not in name])
def test_the_assistants_words_are_trained_and_no_other(template, name):
    """Also of templates without blocks."""
    template = template(name)
    for key in (key for key, golden in EXPECTED[name].items() if golden != "refused"):
        messages, tools = CONVERSATIONS[key]
        if (name, key) == ("trl/diffusion_gemma", "tools"):
            continue
        rendered = template.render(messages, tools)
        trained = "\0".join(words(rendered))
        for message in messages:
            if message["role"] == "assistant":
                for piece in shown_strings(message, rendered.text):
                    assert piece in trained, (key, piece)
            else:
                foreign = message["content"].strip()
                assert foreign not in trained and json.dumps(foreign)[1:-1] not in trained, (key, foreign)
        assert "Zürich" not in trained and "Adds two" not in trained  # of the tools


# What TRL's blocks hold beyond our spans: what the generation prompt has given already, and the end of a turn that the
# model itself would end otherwise (gpt-oss).
GIVEN = ["<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<|start|>assistant", "<|end|>", "<think></think>", "<think>"]


@pytest.mark.parametrize("name", [name for name in EXPECTED if f"{name}_training" in EXPECTED and "diff" not in name])
def test_differences_of_renderings_agree_with_generation_blocks(template, name):
    """TRL's training templates are the originals with blocks: where the text is the same, so are the words."""
    plain, marked = template(name), template(f"{name}_training")
    assert not plain.marks_generation and marked.marks_generation
    for key, (messages, tools) in CONVERSATIONS.items():
        if "refused" in (EXPECTED[name][key], EXPECTED[f"{name}_training"][key]):
            continue
        one, two = plain.render(messages, tools), marked.render(messages, tools)
        if one.text != two.text:
            continue
        ours, theirs = ("".join("".join(words(rendered)).split()) for rendered in (one, two))
        for given in GIVEN if ours != theirs else ():
            ours, theirs = (text.replace(given, "") for text in (ours, theirs))
        assert ours.replace("</think>", "") == theirs.replace("</think>", ""), key
        marked_places = {place for start, end in two.spans for place in range(start, end)}
        assert all(marked_places.issuperset(range(start, end)) for start, end in one.spans), key


REAL = json.loads((GOLDEN / "tokenizers.json").read_text())


@pytest.mark.parametrize("key", REAL)
def test_real_tokenizers_give_the_ids_and_masks_of_transformers(key):
    """But for the BOS that we put in front where the template writes none."""
    name, _, file = key.partition(" ")
    tokenizer = load_tokenizer(SHARED / "data/tokenizers" / file)
    rendered = load_template(SHARED / f"data/chat_templates/{name}.jinja", tokenizer).render(*CONVERSATIONS["dialogue"])
    sequence = _tokenize(rendered, tokenizer)
    added = not rendered.text.startswith(tokenizer.token(tokenizer.bos_id))
    assert sequence.ids[0] == tokenizer.bos_id
    ids, trained = sequence.ids[added:].tolist(), sequence.trained[added:].astype(int).tolist()
    assert digest(ids) == REAL[key][0]
    assert REAL[key][1] in (None, digest(trained))
