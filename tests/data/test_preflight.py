"""Preflight: each problem from a planted document, none from good ones; the display by its plain text and colours."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from jaxpost.data.dataset import load_dataset
from jaxpost.data.formats import parse
from jaxpost.data.loader import Loader
from jaxpost.data.preflight import check, duplicates, measure, refuse, show_examples, show_row
from jaxpost.data.preflight.documents import check_documents
from jaxpost.data.preflight.examples import disguise
from jaxpost.data.preflight.findings import Problem, group
from jaxpost.data.templates import PLAIN, Template, load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.errors import DataError
from jaxpost.types import Document, Origin
from tests.shared import SHARED, needs_shared

BOS, EOS, PAD = 1, 2, 3  # of the fixture `padded`


def linear(ids, weights, line=1):
    ids, weights = np.array(ids, np.int32), np.array(weights, np.float32)
    return Document(np.zeros(0, np.int32), (ids,), (weights,), line - 1, Origin("data.jsonl", line))


def pair(prompt, chosen, rejected, line=1):
    ids = tuple(np.array(c, np.int32) for c in (chosen, rejected))
    weights = tuple(np.ones(len(c), np.float32) for c in ids)
    return Document(np.array(prompt, np.int32), ids, weights, line - 1, Origin("data.jsonl", line))


PAIR = {"prompt": "Yes or no?", "chosen": " Yes", "rejected": " No"}
GOOD = [
    linear([BOS, 50, 51, 52, EOS], [0, 0, 1, 1, 1]),
    linear([BOS, 50, 51], [0, 1, 1]),  # raw text, a piece of which may end anywhere
    linear([BOS, 50, 51, EOS, 13], [0, 0, 1, 1, 1]),  # a line end behind the end of the turn
    pair([BOS, 50, 51], [52, EOS], [53, 54, EOS]),
]
BAD = {
    "two_bos": [
        linear([BOS, BOS, 50, EOS], [0, 0, 1, 1]),
        linear([BOS, 50, BOS, BOS, 51, EOS], [0, 0, 0, 0, 1, 1]),
        pair([BOS, BOS, 50], [52, EOS], [53, EOS]),
    ],
    "empty_mask": [linear([BOS, 50, EOS], [0, 0, 0])],
    "no_end_trained": [linear([BOS, 50, 51, EOS], [0, 0, 1, 0]), pair([BOS, 50], [52, EOS], [53, 54])],
    "pad_inside": [linear([BOS, 50, 51, PAD, EOS], [0, 0, 1, 1, 1]), pair([BOS, PAD], [52, EOS], [53, EOS])],
    "chosen_equals_rejected": [pair([BOS, 50], [52, EOS], [52, EOS])],
    "beyond_vocabulary": [linear([BOS, 50, 300, EOS], [0, 0, 1, 1]), pair([BOS, 300], [52, EOS], [53, EOS])],
}


@pytest.fixture
def padded(write_tokenizer):
    """The small tokenizer; its third piece, a user-defined one, is made its padding token."""
    tokenizer = load_tokenizer(write_tokenizer(pad_token="<user>"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS, EOS, PAD)
    return tokenizer


def test_good_documents_have_no_problems(padded):
    assert check_documents(GOOD, padded, 400) == (len(GOOD), [])


@pytest.mark.parametrize("reason", BAD)
def test_each_planted_problem_is_found(padded, reason):
    size = 300 if reason == "beyond_vocabulary" else 400
    for document in BAD[reason]:
        _, (problem,) = check_documents([document], padded, size)
        assert problem.reason == reason and str(problem).startswith("data.jsonl:1: ")


@pytest.mark.parametrize("name", ["<s>", "</s>", "<unk>"])
def test_a_padding_token_that_means_something_else_too_may_occur(write_tokenizer, name):
    tokenizer = load_tokenizer(write_tokenizer(pad_token=name, unk_token="<unk>"))
    ids = [BOS, 50, tokenizer.pad_id, 51, EOS]
    assert check_documents([linear(ids, [0, 0, 0, 1, 1])], tokenizer, 400) == (1, [])


def test_two_bos_between_turns_where_it_ends_them_too(write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer(eos_token="<s>"))
    assert check_documents([linear([BOS, 50, BOS, BOS, 51, BOS], [0, 0, 0, 0, 1, 1])], tokenizer, 400) == (1, [])
    _, (problem,) = check_documents([linear([BOS, BOS, 51, BOS], [0, 0, 1, 1])], tokenizer, 400)
    assert problem.reason == "two_bos"


def test_a_turn_that_ends_with_a_token_at_which_nothing_stops(write_tokenizer, tokenizer):
    end = tokenizer.vocab_size
    decoder = {str(end): {"content": "<|end|>", "special": True}}
    document = linear([BOS, 50, 51, end], [0, 0, 1, 1])
    _, (problem,) = check_documents([document], load_tokenizer(write_tokenizer(added_tokens_decoder=decoder)), end + 1)
    assert problem.reason == "end_does_not_stop"
    assert problem.detail == "a turn ends with <|end|>, but generation stops at </s> only"
    folder = write_tokenizer(added_tokens_decoder=decoder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end}]}}')
    assert check_documents([document], load_tokenizer(folder), end + 1) == (1, [])


class Sampled(list):
    """Documents that are sampled at even distances, as those of data/documents.py."""

    def sample(self, count):
        return [self[n] for n in np.linspace(0, len(self) - 1, count).astype(int)]


def test_a_sample_is_looked_at_but_all_where_the_vocabulary_may_not_hold(tokenizer):
    documents = Sampled(linear([BOS, 50, EOS], [0, 0, 0], line) for line in range(1, 102))
    looked_at, problems = check_documents(documents, tokenizer, tokenizer.vocab_size, most=3)
    assert looked_at == 3 and [problem.origin.line for problem in problems] == [1, 51, 101]
    assert len(check_documents(documents, tokenizer, tokenizer.vocab_size - 1, most=3)[1]) == 101


def test_documents_that_are_tokenised_on_demand_are_checked_the_same(tokenizer, write_jsonl):
    """Faults at the first and the last line of 400, one dropped and one found in the tokens."""
    lines = [{"prompt": "A", "chosen": " Yes", "rejected": " Yes"}, *[PAIR] * 398, PAIR | {"prompt": "<s><s>B"}]
    path, template = write_jsonl(*lines), load_template("plain", tokenizer)
    limits = {"vocab_size": 10_000, "max_dropped": 0.05, "on_long": "drop", "most_documents": 20, "most_examples": 5}
    found = {}
    for tokenize in ("ahead", "lazy"):
        options = {"tokenizer": tokenizer, "template": template, "kind": "preference", "max_tokens": 100}
        data = load_dataset(path, **options, tokenize=tokenize)
        findings = check(data, tokenizer=tokenizer, template=template, **limits)
        found[tokenize] = [(finding.reason, finding.first.origin.line) for finding in findings]
    assert found["ahead"] == found["lazy"] == [("chosen_equals_rejected", 1), ("two_bos", 400)]


def test_findings_are_one_line_and_allowed_by_name():
    problems = [Problem("two_bos", "it has two", Origin("a.jsonl", line)) for line in (4, 7)]
    findings = group([Problem("empty_mask", "none", Origin("a.jsonl", 1)), *problems], 9, "documents")
    assert [str(finding) for finding in findings] == [
        "two_bos: 2 of 9 documents; first a.jsonl:4: it has two",
        "empty_mask: 1 of 9 documents; first a.jsonl:1: none",
    ]
    assert refuse(findings, ("empty_mask", "two_bos")) == findings
    with pytest.raises(DataError) as raised:
        refuse(findings, ("two_bos",))
    assert str(raised.value) == f"{findings[1]} (a warning where data.allow names empty_mask)"


# ---- examples in disguise ----

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}MARK{% else %}OTHER{% endif %}{% endfor %}"
)
MARKED += "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
BOT = "{{ '<bot>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
CALLING = BOT.replace("eos_token", "((m.tool_calls or '') | string) + eos_token")
USER = "{{ m.content + '<user>' }}"
TOOL = "{% if m.role == 'tool' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
TEMPLATES = {  # name: (template, what is said of message 3 of the dialogue)
    "good": (MARKED.replace("MARK", CALLING).replace("OTHER", USER), None),
    "plain": (PLAIN, None),
    "a user's turn": (
        MARKED.replace("MARK", CALLING).replace("OTHER", "{% generation %}" + USER + "{% endgeneration %}"),
        "message 1 (user) is trained on, such as",
    ),
    "tool output": (MARKED.replace("MARK", CALLING).replace("OTHER", TOOL), "message 3 (tool) is trained on, such as"),
    "the question repeated in the answer": (
        MARKED.replace("MARK", CALLING.replace("m.content", "messages[0].content + m.content")).replace("OTHER", USER),
        "message 1 (user) is trained on, such as",
    ),
}  # fmt: skip
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Yes", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "Jane Austen 7"},
    {"role": "assistant", "content": "Paris."},
]


def findings_of(path, tokenizer, template, kind="sft", max_tokens=1000, **options):
    data = load_dataset(path, tokenizer=tokenizer, template=template, kind=kind, max_tokens=max_tokens, **options)
    limits = {"vocab_size": 10_000, "max_dropped": 0.05, "on_long": options.get("on_long", "drop")}
    return data, check(data, tokenizer=tokenizer, template=template, **limits)


@pytest.mark.parametrize("name", TEMPLATES)
def test_weight_on_what_is_only_read_is_found_without_asking_the_masks(name, tokenizer, write_jsonl):
    source, said = TEMPLATES[name]
    _, findings = findings_of(write_jsonl({"messages": TALK}), tokenizer, Template(source, tokenizer))
    found = [str(finding) for finding in findings if finding.reason == "seen_trained"]
    assert bool(found) == (said is not None) and len(findings) == len(found), findings
    assert said is None or said in found[0]


@pytest.mark.parametrize(
    "end, said",
    [
        ("eos_token + '<user>'", "'<user>', behind the end of a turn, is trained"),
        ("eos_token + ('' if loop.last else '<user>')", "'<user>', behind the end of a turn, is trained"),
        ("eos_token + '\\n'", None),
    ],
)
def test_a_header_of_the_next_turn_that_is_trained_is_found(end, said, tokenizer, write_jsonl):
    """Written by the block of the turn before it, so that no letters of it depend on what the user says."""
    talk = [TALK[0], {"role": "assistant", "content": "Yes"}, TALK[0], TALK[3]]
    bot = BOT.replace("m.content + eos_token", f"m.content + {end}")
    template = Template(MARKED.replace("MARK", bot).replace("OTHER", "{{ m.content }}"), tokenizer)
    _, findings = findings_of(write_jsonl({"messages": talk}), tokenizer, template)
    assert [finding.first.detail for finding in findings] == [said] * (said is not None)


def test_a_header_that_ends_generation_is_rightly_trained(write_tokenizer, write_jsonl):
    """As in GLM, whose models stop at the header of the user's turn."""
    folder = write_tokenizer()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token(3) == "<user>"
    talk = [TALK[0], {"role": "assistant", "content": "Yes"}, TALK[0], TALK[3]]
    bot = BOT.replace("m.content + eos_token", "m.content + '<user>'")
    template = Template(MARKED.replace("MARK", bot).replace("OTHER", "{{ m.content }}"), tokenizer)
    assert findings_of(write_jsonl({"messages": talk}), tokenizer, template)[1] == []


def test_examples_that_the_template_refuses_in_disguise_are_counted(tokenizer, write_jsonl):
    """One refuses other words in the question, one another name of the tool that is called."""
    wanting = {
        "'capital' not in messages[0].content": "Why? it says",
        "m.tool_calls and m.tool_calls[0].function.name != 'f'": "Why? it says",
    }
    for condition, reason in wanting.items():
        refusing = f"{{% if {condition} %}}{{{{ raise_exception('{reason}') }}}}{{% endif %}}"
        source = MARKED.replace("{% if m.role", refusing + "{% if m.role", 1)
        template = Template(source.replace("MARK", CALLING).replace("OTHER", USER), tokenizer)
        _, (finding,) = findings_of(write_jsonl({"messages": TALK}, {"messages": TALK}), tokenizer, template)
        assert (finding.reason, finding.count, finding.looked_at) == ("not_checked", 2, 2)
        assert reason in finding.first.detail
        assert refuse([finding], ()) == [finding]


def test_a_template_that_leaves_out_tool_calls_is_found(tokenizer, write_jsonl):
    """The answer that is trained would be an end of turn and nothing else."""
    path = write_jsonl({"messages": [*TALK[:1], TALK[1] | {"content": ""}, *TALK[2:]]})
    for bot, count in ((BOT, 1), (CALLING, 0)):
        template = Template(MARKED.replace("MARK", bot).replace("OTHER", USER), tokenizer)
        _, findings = findings_of(path, tokenizer, template)
        assert [f.reason for f in findings] == ["completion_lost"] * count
        assert not findings or "the template leaves out the tool calls of message 2" in str(findings[0])


def test_a_mask_that_loses_the_end_of_an_answer_is_found(tokenizer, write_jsonl):
    """What somebody else's encoding, or a cache of another one, might hand over."""
    path, template = write_jsonl({"messages": TALK}), load_template("plain", tokenizer)
    data, findings = findings_of(path, tokenizer, template)
    assert findings == []
    document = data.documents[0]
    cut = dataclasses.replace(
        document, completions=(document.completions[0][:-3],), weights=(document.weights[0][:-3],)
    )
    stale = dataclasses.replace(data, documents=[cut])
    limits = {"vocab_size": 10_000, "max_dropped": 0.05, "on_long": "truncate"}
    reasons = [finding.reason for finding in check(stale, tokenizer=tokenizer, template=template, **limits)]
    assert "completion_lost" in reasons


def test_a_disguise_keeps_everything_but_the_letters_of_what_is_only_read():
    history = [{"role": "system", "content": "Be brief, été 你好 12 <think>x</think> /no_think."}]
    example = parse({"prompt": history, "completion": TALK}, Origin("a", 1))
    found = disguise(example)
    assert found.prompt.messages[0]["content"] == "xx xxxxx, xxx xx xx <think>y</think> /no_think."
    assert found.completions[0][1::2] == example.completions[0][1::2]
    assert found.completions[0][2]["content"] == "xxxx xxxxxx x"
    one = disguise(example, 2)  # the prompt's message is 0, the user's turn 1, the tool's 2
    assert one.prompt == example.prompt and one.completions[0][0] == example.completions[0][0]
    assert one.completions[0][2]["content"] == "xxxx xxxxxx x"
    raw = disguise(parse({"prompt": "Who wrote Emma? Nobody knows. Answer:", "completion": " Jane"}, Origin("a", 1)))
    assert raw.prompt.endswith("knows. Answer:")
    assert raw.prompt.startswith("xxx xxxxx xxxx? ") and raw.completions == (" Jane",)


# ---- numbers ----


def test_lengths_by_hand():
    documents = [
        linear([BOS, 50, 51, 52, 53, EOS], [0, 0, 1, 1, 0, 1]),  # a seen token between two trained turns
        pair([BOS, 50, 51], [52, EOS], [53, 54, EOS]),
    ]
    found = measure(documents)
    assert (found.prompt.tolist(), found.completion.tolist(), found.whole.tolist()) == ([2, 3, 3], [3, 2, 3], [6, 5, 6])
    assert found.rows()[2] == ("whole", [6, 6, 6, 6])


def test_duplicates_are_other_examples_with_the_same_tokens():
    one, other, same = (linear([BOS, word, EOS], [0, 1, 1], line) for line, word in ((1, 50), (2, 51), (3, 50)))
    assert duplicates([one, other, same, same]) == [(same.origin, one.origin)]
    assert duplicates([one, one, other]) == []  # a weight of 2
    joined = [pair([BOS, 50], [51, 52], [53], line) for line in (1, 2)] + [pair([BOS, 50], [51], [52, 53], 3)]
    assert duplicates(joined) == [(joined[1].origin, joined[0].origin)]


def shown(document, tokenizer, colour=None, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=200, color_system=colour, force_terminal=colour is not None)
    show_examples([document], tokenizer, 5, console, **options)
    return stream.getvalue()


def test_every_token_is_shown_and_trained_ones_are_marked(tokenizer):
    question, answer = tokenizer.encode("Yes No\n<user>"), tokenizer.encode("France")
    document = linear([BOS, *question, *answer, EOS], [0] * (1 + len(question)) + [1] * (len(answer) + 1), 4)
    text = shown(document, tokenizer)
    assert "example 3, data.jsonl:4" in text and "sequence: 7 tokens, 2 trained" in text
    assert "<s>| Yes| No|⏎\n|<user>|[[ France|</s>]]" in text
    coloured = shown(document, tokenizer, "truecolor")
    assert coloured.count("[[") == 0 and "France" in coloured and "\x1b[" in coloured


def test_colours_tell_trained_from_seen(tokenizer):
    """The same token in the same place, trained and not, is drawn in the two styles."""
    words = tokenizer.encode("France")
    styles = {}
    for weight in (0.0, 1.0):
        text = shown(linear([BOS, *words], [0, weight]), tokenizer, "truecolor")
        styles[weight] = next(line for line in text.splitlines() if "France" in line)
    assert styles[0.0] != styles[1.0]


def test_pairs_are_shown_in_three_parts_and_long_ones_cut_in_the_middle(tokenizer):
    many = tokenizer.encode(" ".join(["Yes"] * 50))
    text = shown(pair([BOS, *many], [52, EOS], [53, EOS]), tokenizer, most_tokens=10)
    places = [text.index(part) for part in ("prompt: 51", "chosen: 2", "rejected: 2")]
    assert places == sorted(places)
    assert (
        text.count(" Yes") == 9
        and text.count("[[") == text.count("]]")
        and f"... {len(many) + 1 - 10} tokens ..." in text
    )


def test_brackets_close_where_the_middle_of_an_answer_is_left_out(tokenizer):
    words = tokenizer.encode(" ".join(["Yes"] * 50))
    text = shown(linear([BOS, *words], [0, *[1] * len(words)]), tokenizer, most_tokens=6)
    assert text.split("]] ... 45 tokens ... [[")[1:] == [" Yes| Yes| Yes]]\n"], text


def test_a_packed_row_is_shown_with_its_documents_and_its_empty_end(tokenizer):
    words = tokenizer.encode("France Yes")
    documents = [linear([BOS, *words, EOS], [0, 0, *[1] * (len(words) - 1), 1], line) for line in range(1, 6)]
    used = sum(document.cost for document in documents)
    shape = {"rows_per_step": 1, "tokens_per_row": used + 5, "documents_per_row": 9, "branches": 0}
    stream = io.StringIO()
    show_row(Loader(documents, **shape, seed=0, shuffle=False), tokenizer, Console(file=stream, width=200))
    text = stream.getvalue()
    assert f"{used} of {used + 5} places taken" in text and "padding: 5 empty places ·····\n" in text
    assert [f"document {n} of 5, data.jsonl:{n}: " in text for n in range(1, 6)] == [True, True, False, False, True]
    assert "... 2 more documents ..." in text and text.count("<s>|") == 3


@needs_shared
def test_real_data_has_no_problems():
    tokenizer = load_tokenizer(SHARED / "models/stories260K")
    template = load_template("plain", tokenizer)
    for path in ("fastchat_chat/dummy_conversation.json", "llamafactory_demo/identity.json"):
        assert findings_of(SHARED / "data" / path, tokenizer, template, max_tokens=1024)[1] == []
