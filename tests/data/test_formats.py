"""Formats: every record form to the messages it stands for; faults by their reason."""

import json

import pytest

from jaxpost.data.formats import FORMATS, ExampleFault, detect, parse
from jaxpost.errors import DataError
from jaxpost.types import Origin

HERE = Origin("data.jsonl", 7)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


DIALOGUE = [user("Hi"), bot("Hello"), user("Bye"), bot("See you")]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
TOOL = {"name": "add", "parameters": {}}
CALL = [
    {"from": "human", "value": "1+1?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "Two."},
]
CALLED = (
    user("1+1?"),
    bot("") | {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
    bot("Two."),
)
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"

# record, format, kind, prompt messages or text, completions
FORMS = [
    ({"messages": DIALOGUE, "id": 5}, "messages", "chat", (), (tuple(DIALOGUE),)),
    ({"conversations": SHAREGPT}, "sharegpt", "chat", (), ((user("Hi"), bot("Hello")),)),
    ({"conversations": SHAREGPT, "system": "S"}, "sharegpt", "chat", (), ((system("S"), user("Hi"), bot("Hello")),)),
    ({"conversations": CALL, "tools": json.dumps([TOOL])}, "sharegpt", "chat", (), (CALLED,)),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, "alpaca", "chat", (user("Add\n1 1"),), ((bot("2"),),)),
    ({"instruction": "Hi", "input": "", "output": "Yo"}, "alpaca", "chat", (user("Hi"),), ((bot("Yo"),),)),
    (
        {"instruction": "C", "output": "D", "history": [["A", "B"]], "system": "S"},
        "alpaca",
        "chat",
        (system("S"), user("A"), bot("B"), user("C")),
        ((bot("D"),),),
    ),
    ({"prompt": "1+1=", "completion": "2"}, "prompt_completion", "text", "1+1=", ("2",)),
    (
        {"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:2]},
        "prompt_completion",
        "chat",
        (user("Hi"),),
        ((bot("Hello"),),),
    ),
    ({"text": "Once upon a time"}, "text", "text", None, ("Once upon a time",)),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", "preference", "Q", ("A", "B")),
    (
        {"prompt": [user("Q")], "chosen": [bot("A")], "rejected": [bot("B")]},
        "preference",
        "preference",
        (user("Q"),),
        ((bot("A"),), (bot("B"),)),
    ),
    (  # the prompt as text beside whole dialogues, as in ultrafeedback_binarized
        {"prompt": "Q", "chosen": [user("Q"), bot("A")], "rejected": [user("Q"), bot("B")]},
        "preference",
        "preference",
        (user("Q"),),
        ((bot("A"),), (bot("B"),)),
    ),
    (
        {"chosen": HUMAN + " Ciao", "rejected": HUMAN + " Leave!\n\nNow."},
        "dialogue_pair",
        "preference",
        tuple(DIALOGUE[:3]),
        ((bot("Ciao"),), (bot("Leave!\n\nNow."),)),
    ),
    (
        {"chosen": DIALOGUE, "rejected": [*DIALOGUE[:3], bot("Hm")]},
        "dialogue_pair",
        "preference",
        tuple(DIALOGUE[:3]),
        ((bot("See you"),), (bot("Hm"),)),
    ),
    (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "Go"}},
        "sharegpt_preference",
        "preference",
        (user("Hi"),),
        ((bot("Hello"),), (bot("Go"),)),
    ),
]


@pytest.mark.parametrize("record, name, kind, prompt, completions", FORMS)
def test_each_form_is_detected_and_parsed(record, name, kind, prompt, completions):
    assert detect(record, HERE) == name
    example = parse(record, HERE)
    assert (example.format, example.kind, example.origin) == (name, kind, HERE)
    assert (example.prompt if kind == "text" or isinstance(prompt, str) else example.prompt.messages) == prompt
    assert example.completions == completions
    assert parse(record, HERE, name) == example


def test_every_format_has_a_form_here():
    assert {form[1] for form in FORMS} == set(FORMATS)


def test_tools_are_wrapped_as_openai_functions():
    wrapped = {"type": "function", "function": TOOL}
    for tools in (json.dumps([TOOL]), [TOOL], [wrapped]):
        assert parse({"messages": DIALOGUE, "tools": tools}, HERE).prompt.tools == (wrapped,)
    for tools in ("", None, [], "[]"):
        assert parse({"messages": DIALOGUE, "tools": tools}, HERE).prompt.tools is None


def test_content_as_text_blocks_and_extra_keys_of_messages():
    blocks = [{"type": "text", "text": "He"}, {"type": "text", "text": "y"}]
    (completion,) = parse({"messages": [user(blocks), bot("Yo") | {"reasoning_content": "r"}]}, HERE).completions
    assert completion == (user("Hey"), bot("Yo") | {"reasoning_content": "r"})


def pair(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


FAULTS = [
    ({"messages": [user("Hi"), bot(" \n")]}, "empty_completion"),
    ({"messages": [user("Hi"), bot(None)]}, "empty_completion"),
    ({"prompt": "Q", "completion": " "}, "empty_completion"),
    ({"text": ""}, "empty_completion"),
    ({"instruction": "Q", "output": ""}, "empty_completion"),
    (pair(HUMAN + " ", HUMAN + " Ciao"), "empty_completion"),
    (pair(HUMAN + " Ciao", HUMAN + "  Ciao "), "chosen_equals_rejected"),
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen_equals_rejected"),
    ({"prompt": [user("Q")], "chosen": [bot("A")], "rejected": [bot("A")]}, "chosen_equals_rejected"),
    (pair(HUMAN + " Ciao\n\nAssistant: Bye", HUMAN + " Ciao"), "prompts_differ"),
    (pair(HUMAN + " Ciao\n\nAssistant: Bye", HUMAN + " Ta"), "prompts_differ"),  # two turns against one
    (pair(HUMAN + " Ciao", HUMAN.replace("Bye", "Ta") + " Ciao"), "prompts_differ"),
    (pair(DIALOGUE, [*DIALOGUE[:2], user("Other"), bot("Hm")]), "prompts_differ"),
    (pair("no markers", "at all"), "no_messages"),
    ({"messages": []}, "no_messages"),
    ({"messages": [user("Hi"), {"role": "wizard", "content": "x"}, bot("Yo")]}, "unknown_role"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown_role"),
    ({"messages": [system("A"), system("B"), user("Hi"), bot("Yo")]}, "two_system_messages"),
    ({"conversations": [{"from": "system", "value": "A"}, *SHAREGPT], "system": "B"}, "two_system_messages"),
    ({"messages": [user("Hi"), system("A"), bot("Yo")]}, "system_not_first"),
    ({"messages": [user("Hi")]}, "no_assistant_turn"),
    ({"messages": [user(5), bot("Yo")]}, "not_text"),
    ({"messages": [user([{"type": "image"}]), bot("Yo")]}, "not_text"),
    ({"messages": ["Hi"]}, "not_a_message"),
    ({"conversations": [{"from": "human"}]}, "not_a_message"),
    ({"instruction": "Q", "output": "A", "history": [["B"]]}, "not_a_message"),
    ({"messages": DIALOGUE, "tools": "{"}, "bad_json"),
    ({"messages": DIALOGUE, "tools": ["add"]}, "bad_tools"),
    ({"conversations": [*CALL[:1], {"from": "function_call", "value": "add(1)"}]}, "bad_json"),
]


@pytest.mark.parametrize("record, reason", FAULTS, ids=[f"{reason}-{i}" for i, (_, reason) in enumerate(FAULTS)])
def test_faults_of_one_example(record, reason):
    with pytest.raises(ExampleFault) as fault:
        parse(record, HERE)
    assert fault.value.reason == reason and fault.value.origin == HERE
    assert str(fault.value).startswith("data.jsonl:7: ") and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": DIALOGUE, "label": True}, "no format fits a record with the keys label, messages"),
        ({"question": "Q", "answer": "A"}, "no format fits"),
        ({"messages": DIALOGUE, "text": "x"}, "no format fits"),
        ({}, r"keys \(none\)"),
    ],
)
def test_what_is_not_sure_is_not_guessed(record, message):
    with pytest.raises(DataError, match=message) as error:
        parse(record, HERE)
    assert not isinstance(error.value, ExampleFault)
    assert all(name in str(error.value) for name in FORMATS)  # says what there is


def test_a_named_format_reads_what_it_needs_and_no_more():
    """A user may say that unpaired feedback is to be read as plain conversations; a missing key is named."""
    assert parse({"messages": DIALOGUE, "label": True}, HERE, "messages").completions == (tuple(DIALOGUE),)
    with pytest.raises(DataError, match=r"data.jsonl:7: format alpaca needs the key output, found instruction"):
        parse({"instruction": "Q"}, HERE, "alpaca")
    with pytest.raises(DataError, match="no format is called 'parrot'"):
        parse({"text": "x"}, HERE, "parrot")
