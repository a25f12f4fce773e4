"""Formats: every record form to the messages it stands for; faults by their reason."""

import collections
import json

import pytest

from jaxpost.data.formats import FORMATS, ExampleFault, detect, parse
from jaxpost.data.sources import open_source
from jaxpost.errors import DataError
from jaxpost.types import Origin
from tests.shared import SHARED, needs_shared

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
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
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

SOLVED = {
    "question": "1+1?",
    "ground_truth": "A: 2",
    **{f"6b_{how}": {"is_correct": False, "solution": f"{how} A: 3"} for how in ("finetuning", "verification")},
    **{f"175b_{how}": {"is_correct": True, "solution": f"{how} A: 2"} for how in ("finetuning", "verification")},
}
BFCL = {
    "id": "simple_0",
    "question": [[user("1+1?")]],
    "function": [{"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "float"}}}}],
}
RATED = ((bot("B"),), (bot("A"),))
FORMS += [
    ({"question": "1+1?", "answer": "#### 2"}, "question_answer", "chat", (user("1+1?"),), ((bot("#### 2"),),)),
    ({"prompt": "Q", "completions": ["A", "B", "C"]}, "ranking", "ranking", "Q", ("A", "B", "C")),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [1, 2.5]}, "ranking", "ranking", "Q", ("B", "A")),
    ({"prompt": "Q", "completions": [[bot("B")], bot("A")]}, "ranking", "ranking", (user("Q"),), RATED),
    ({"prompt": [user("Q")], "completions": [[bot("B")], [bot("A")]]}, "ranking", "ranking", (user("Q"),), RATED),
    ({"prompt": "Q", "completions": ["A", "B"], "labels": [True, 0.5]}, "stepwise", "stepwise", "Q", ("A\nB",)),
    (
        {"prompt": [user("Q")], "completions": ["A"], "labels": [0]},
        "stepwise",
        "stepwise",
        (user("Q"),),
        ((bot("A"),),),
    ),
    (
        SOLVED,
        "gsm8k_solutions",
        "ranking",
        (user("1+1?"),),
        tuple(
            (bot(f"{text}"),)
            for text in ("finetuning A: 2", "verification A: 2", "finetuning A: 3", "verification A: 3")
        ),
    ),
    ({"prompt": "Q", "completion": "A", "label": True}, "unpaired", "unpaired", "Q", ("A",)),
    (
        {"prompt": [user("Q")], "completion": [bot("A")], "label": 0},
        "unpaired",
        "unpaired",
        (user("Q"),),
        ((bot("A"),),),
    ),
    (
        {"messages": DIALOGUE, "label": False},
        "unpaired_messages",
        "unpaired",
        tuple(DIALOGUE[:3]),
        ((bot("See you"),),),
    ),
    (
        {"conversations": SHAREGPT, "system": "S", "label": True},
        "unpaired_sharegpt",
        "unpaired",
        (system("S"), user("Hi")),
        ((bot("Hello"),),),
    ),
    ({"prompt": "Q", "key": 1000, "kwargs": [{}]}, "prompt", "prompt", "Q", ()),  # as in IFEval
    ({"prompt": [user("Q")]}, "prompt", "prompt", (user("Q"),), ()),
    (BFCL, "bfcl", "prompt", (user("1+1?"),), ()),
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
    assert {form[1] for form in FORMS} | {"bfcl_answer"} == set(FORMATS)  # that one needs a file beside its own


def test_values_of_completions():
    """Scores as given, sorted with their completions; the order as N-1, ..., 0 where there are none; labels as 1, 0."""

    def values(record, kind=None):
        return parse(record, HERE, kind=kind).values

    assert values({"prompt": "Q", "completions": ["A", "B", "C"]}) == {"score": (2.0, 1.0, 0.0)}
    rated = {"prompt": "Q", "completions": ["A", "B", "C"], "scores": [0.5, 3, 0.5]}
    assert values(rated) == {"score": (3.0, 0.5, 0.5)}
    assert parse(rated, HERE).completions == ("B", "A", "C")  # equal ones keep their order
    assert values({"prompt": "Q", "completions": ["A", "B"], "scores": None}) == {"score": (1.0, 0.0)}
    assert values(SOLVED) == {"score": (1.0, 1.0, 0.0, 0.0)}
    for label, number in ((True, 1.0), (False, 0.0), (1, 1.0), (0.0, 0.0)):
        assert values({"prompt": "Q", "completion": "A", "label": label}) == {"label": (number,)}
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    assert values(pair) == values(pair, "preference") == {}


def test_a_pair_is_a_ranking_of_two():
    example = parse({"prompt": "Q", "chosen": "A", "rejected": "B"}, HERE, kind="ranking")
    assert (example.kind, example.format, example.completions) == ("ranking", "preference", ("A", "B"))
    assert example.values == {"score": (1.0, 0.0)}
    fitting = {kind: {f.name for f in FORMATS.values() if f.fits(kind)} for kind in ("ranking", "preference")}
    assert fitting["preference"] < fitting["ranking"] and "ranking" not in fitting["preference"]


def test_bfcl_answers_are_joined_with_their_questions(tmp_path):
    truth = {"add": {"a": [2.5, 2], "unit": ["", "m"], "where": [{"x": [1], "y": ["", 0]}], "by": ["h", ""]}}
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "set.json").write_text(json.dumps(BFCL) + "\n")
    answer = {"id": "simple_0", "ground_truth": [truth]}
    origin = Origin(str(tmp_path / "possible_answer/set.json"), 1)
    assert detect(answer, origin) == "bfcl_answer"
    example = parse(answer, origin)
    asked = parse(BFCL, HERE).prompt
    properties = {"a": {"type": "number"}}
    function = {"name": "add", "parameters": {"type": "object", "properties": properties}}
    assert asked.tools == ({"type": "function", "function": function},)
    assert (example.kind, example.prompt) == ("chat", asked)
    arguments = {"a": 2.5, "where": {"x": 1}, "by": "h"}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    assert example.completions == ((bot("") | {"tool_calls": [call]},),)
    with pytest.raises(ExampleFault, match=r"set\.json has no record with the id 'other'") as fault:
        parse(answer | {"id": "other"}, origin)
    assert fault.value.reason == "not_beside"
    with pytest.raises(DataError, match=r"nowhere\.json: no such file; the records of this format belong"):
        parse(answer, Origin(str(tmp_path / "possible_answer/nowhere.json"), 1))


@pytest.mark.parametrize(
    "message, calls",
    [
        (bot(None) | {"tool_calls": [ADD]}, [ADD]),
        (bot("Hm") | {"tool_calls": [ADD | {"id": "x7"}]}, [ADD | {"id": "x7"}]),
        (bot("") | {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}, [ADD]),
        (bot("") | {"tool_calls": [{"function": {"name": "add", "arguments": '{"a":1}'}}]}, [ADD]),
        (bot("") | {"function_call": {"name": "add", "arguments": '{"a": 1}'}}, [ADD]),
        (
            bot("") | {"tool_calls": [{"name": "now"}]},
            [{"type": "function", "function": {"name": "now", "arguments": {}}}],
        ),
        (
            bot("") | {"tool_calls": [{"name": "now", "arguments": ""}] * 2},
            [{"type": "function", "function": {"name": "now", "arguments": {}}}] * 2,
        ),
    ],
)
def test_tool_calls_are_brought_to_one_form(message, calls):
    result = {"role": "tool", "content": "2", "tool_call_id": "x7"}
    (completion,) = parse({"messages": [user("Q"), message, result, bot("Two.")]}, HERE).completions
    assert completion[1] == bot(message["content"] or "") | {"tool_calls": calls}
    assert completion[2] == result


def test_messages_without_calls_have_no_key_for_them():
    (completion,) = parse(
        {"messages": [user("Q"), bot("A") | {"tool_calls": None, "function_call": None}]}, HERE
    ).completions
    assert completion[1] == bot("A")
    old = {"role": "function", "name": "add", "content": "2"}
    (completion,) = parse({"messages": [user("Q"), old, bot("A")]}, HERE).completions
    assert completion[1] == old | {"role": "tool"}


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
    ({"conversations": [*CALL[:1], {"from": "function_call", "value": "[5]"}]}, "bad_tool_call"),
    ({"messages": [user("Q"), bot("") | {"tool_calls": [{"function": {"arguments": {}}}]}]}, "bad_tool_call"),
    ({"messages": [user("Q"), bot("") | {"tool_calls": [{"name": "add", "arguments": "[1]"}]}]}, "bad_tool_call"),
    ({"messages": [user("Q"), bot("") | {"tool_calls": [{"name": "add", "arguments": "{"}]}]}, "bad_json"),
    ({"messages": [user("Q"), bot("") | {"tool_calls": ADD}]}, "bad_tool_call"),
    ({"prompt": "Q", "completions": ["A"]}, "single_completion"),
    ({"prompt": "Q", "completions": []}, "single_completion"),
    ({"prompt": "Q", "completions": ["A"], "labels": []}, "bad_labels"),
    ({"prompt": "Q", "completions": ["A"], "labels": [2]}, "bad_labels"),
    ({"prompt": "Q", "completions": ["A"], "labels": [float("nan")]}, "bad_labels"),
    ({"prompt": "Q", "completions": ["A", " "], "labels": [0, 1]}, "empty_completion"),
    ({"prompt": "Q", "completions": "A"}, "not_a_list"),
    ({"prompt": "Q", "completions": ["A", ""]}, "empty_completion"),
    ({"prompt": "Q", "completions": ["A", "B", "A"]}, "equal_completions"),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [1, 1.0]}, "tie"),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [1]}, "bad_scores"),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [1, float("nan")]}, "bad_scores"),
    ({"prompt": "Q", "completions": ["A", "B"], "scores": [1, True]}, "bad_scores"),
    ({"prompt": "Q", "completions": ["A", [bot("B")]]}, "no_messages"),
    (SOLVED | {"6b_finetuning": 5}, "bad_solution"),
    ({"prompt": "Q", "completion": "A", "label": "good"}, "bad_label"),
    ({"messages": DIALOGUE, "label": None}, "bad_label"),
    ({"messages": DIALOGUE[:3], "label": True}, "no_assistant_turn"),
    ({"prompt": DIALOGUE}, "answered"),
    ({"prompt": [user("Q"), system("S")]}, "system_not_first"),
    (BFCL | {"question": [[user("A")], [user("B")]]}, "several_turns"),
]


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
SCORES = [
    ({"score_chosen": 7, "score_rejected": 2.5}, (7.0, 2.5)),
    ({"margin": 1.5}, (1.5, 0.0)),
    ({}, "no_score"),
    ({"score_chosen": 7}, "no_score"),
    ({"score_chosen": 2, "score_rejected": 2}, "no_winner"),
    ({"margin": -1}, "no_winner"),
    ({"margin": float("nan")}, "bad_scores"),
    ({"score_chosen": "7", "score_rejected": 2}, "bad_scores"),
]


@pytest.mark.parametrize("scores, found", SCORES)
def test_scores_of_a_pair(scores, found):
    """They are read where a loss asks for them, and of no interest elsewhere."""
    assert parse(PAIR | scores, HERE, kind="preference").values == {}
    if isinstance(found, tuple):
        assert parse(PAIR | scores, HERE, kind="scored").values == {"score": found}
        return
    with pytest.raises(ExampleFault) as fault:
        parse(PAIR | scores, HERE, kind="scored")
    assert fault.value.reason == found and str(fault.value).startswith("data.jsonl:7: ")


@pytest.mark.parametrize("record, reason", FAULTS, ids=[f"{reason}-{i}" for i, (_, reason) in enumerate(FAULTS)])
def test_faults_of_one_example(record, reason):
    with pytest.raises(ExampleFault) as fault:
        parse(record, HERE)
    assert fault.value.reason == reason and fault.value.origin == HERE
    assert str(fault.value).startswith("data.jsonl:7: ") and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": DIALOGUE, "scores": [1]}, "no format fits a record with the keys messages, scores"),
        ({"text": "x", "label": 1}, "no format fits"),
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


# --- real files -----------------------------------------------------------------------------------------------------

REAL = [  # file, format, kind, records, faults by reason
    ("llamafactory_demo/alpaca_en_demo.json", "alpaca", "chat", 999, {}),
    ("llamafactory_demo/identity.json", "alpaca", "chat", 91, {}),
    ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt", "chat", 300, {}),
    ("llamafactory_demo/dpo_en_demo.json", "sharegpt_preference", "preference", 300, {}),
    ("llamafactory_demo/kto_en_demo.json", "unpaired_messages", "unpaired", 300, {}),
    ("fastchat_chat/dummy_conversation.json", "sharegpt", "chat", 500, {}),
    ("hh_rlhf/pairs.jsonl.gz", "dialogue_pair", "preference", 1800, {"empty_completion": 3, "prompts_differ": 4}),
    ("gsm8k/train.jsonl", "question_answer", "chat", 3000, {}),
    ("gsm8k/test.jsonl", "question_answer", "chat", 400, {}),
    ("gsm8k/example_model_solutions.jsonl", "gsm8k_solutions", "ranking", 400, {"tie": 192, "equal_completions": 1}),
    ("bfcl/BFCL_v4_irrelevance.json", "bfcl", "prompt", 240, {}),
    ("bfcl/BFCL_v4_simple_python.json", "bfcl", "prompt", 400, {}),
    ("bfcl/possible_answer/BFCL_v4_simple_python.json", "bfcl_answer", "chat", 400, {}),
    ("ifeval/input_data.jsonl", "prompt", "prompt", 270, {}),
]


@needs_shared
def test_every_real_file_is_listed():
    folders = ("llamafactory_demo", "fastchat_chat", "hh_rlhf", "gsm8k", "bfcl")
    files = {str(p.relative_to(SHARED / "data")) for f in folders for p in (SHARED / "data" / f).rglob("*.json*")}
    assert files == {row[0] for row in REAL} - {"ifeval/input_data.jsonl"}


@needs_shared
@pytest.mark.parametrize("path, name, kind, count, faults", REAL, ids=[row[0] for row in REAL])
def test_real_files(path, name, kind, count, faults):
    source = open_source(SHARED / "data" / path)
    found, examples = collections.Counter(), []
    for record, origin in (source[i] for i in range(len(source))):
        assert detect(record, origin) == name
        try:
            examples.append(parse(record, origin))
        except ExampleFault as fault:
            found[fault.reason] += 1
    assert len(source) == count == len(examples) + found.total()
    assert found == faults
    assert {(example.kind, example.format) for example in examples} == {(kind, name)}
    for example in examples:
        for completion in example.completions:
            assert completion[-1]["role"] == "assistant"
        calls = [call for c in example.completions for message in c for call in message.get("tool_calls", ())]
        assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
        assert bool(calls) or name != "bfcl_answer"


@needs_shared
def test_what_real_feedback_holds():
    kto = open_source(SHARED / "data/llamafactory_demo/kto_en_demo.json")
    labels = collections.Counter(parse(*kto[i]).values["label"] for i in range(len(kto)))
    assert labels == {(1.0,): 150, (0.0,): 150}
    glaive = open_source(SHARED / "data/llamafactory_demo/glaive_toolcall_en_demo.json")
    turns = [m for i in range(len(glaive)) for m in parse(*glaive[i]).completions[0]]
    assert sum("tool_calls" in turn for turn in turns) == sum(turn["role"] == "tool" for turn in turns) == 211
