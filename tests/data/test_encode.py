"""Encoding: masks, BOS, boundaries within tokens, shared prompts and truncation, by hand and as invariances."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpost.data.encode import encode
from jaxpost.data.formats import ExampleFault, parse
from jaxpost.data.templates import Template, load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.types import Origin

HERE = Origin("data.jsonl", 3)
USER = {"role": "user", "content": "What is the capital of France?"}
MARKED = (  # no BOS; a turn ends with <bot>
    "{% for m in messages %}{{ '<user>' + m.role + ':' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<bot>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<bot>' }}{% endif %}{% endfor %}"
)
SPACED = (  # the space before an answer stands in the prompt
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def bot(text):
    return {"role": "assistant", "content": text}


def run(record, tokenizer, template=None, max_tokens=1000, on_long="drop"):
    template = template if isinstance(template, Template) else Template(template or SPACED, tokenizer)
    example = parse(record, HERE)
    return encode(example, 5, template=template, tokenizer=tokenizer, max_tokens=max_tokens, on_long=on_long)


def one(*args, **kwargs):
    (document,) = run(*args, **kwargs).documents
    return document


def trained_text(tokenizer, document, n=0):
    return tokenizer.decode(document.completions[n][document.weights[n] > 0], skip_special=False)


def spelled(tokenizer, ids):
    return [tokenizer.token(i) for i in ids]


def test_a_conversation_becomes_a_linear_document(tokenizer):
    document = one({"messages": [USER, bot("Paris."), USER, bot("Yes.")]}, tokenizer, load_template("plain", tokenizer))
    assert document.linear and document.example_id == 5 and document.origin == HERE
    (ids,), (weights,) = document.completions, document.weights
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    question = "User: What is the capital of France?\nAssistant:"
    assert tokenizer.decode(ids, skip_special=False) == f"<s>{question} Paris.</s>{question} Yes.</s>"
    assert trained_text(tokenizer, document) == "Paris.</s> Yes.</s>"  # the first space is the decoder's to strip


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", ["{{ bos_token }}", ""])
def test_bos_is_written_exactly_once(write_tokenizer, adds, writes):
    tokenizer = load_tokenizer(write_tokenizer(add_bos_token=adds))
    template = Template(writes + MARKED, tokenizer)
    (ids,) = one({"messages": [USER, bot("Paris.")]}, tokenizer, template).completions
    assert (ids == tokenizer.bos_id).sum() == (1 if adds or writes else 0)
    assert ids[0] == (tokenizer.bos_id if adds or writes else tokenizer.encode("<user>")[0])
    assert template.encode([USER, bot("Paris.")], tokenizer) == ids.tolist()


def test_the_end_of_turn_is_trained_and_nothing_of_the_user(tokenizer):
    document = one({"messages": [USER, bot("Paris."), USER, bot("Yes.")]}, tokenizer, MARKED)
    assert trained_text(tokenizer, document) == "Paris.<bot>Yes.<bot>"


LETTERS = st.text(st.sampled_from("aehnrs .?é😀"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=4))
def test_any_dialogue_trains_the_answers_alone(tokenizer, turns):
    messages = [m for question, answer in turns for m in (USER | {"content": question}, bot(answer))]
    template = Template(MARKED, tokenizer)
    document = one({"messages": messages}, tokenizer, template)
    ids = document.completions[0]
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(template.render(messages).text)]  # once, as a whole
    runs = itertools.groupby(zip(ids, document.weights[0], strict=True), lambda pair: pair[1])
    answers = [tokenizer.decode([i for i, _ in run], skip_special=False) for trained, run in runs if trained]
    assert [answer.strip() for answer in answers] == [f"{answer}<bot>".strip() for _, answer in turns]


def test_a_token_is_trained_iff_its_last_character_is(tokenizer):
    """A token that begins in the prompt and ends in the answer is trained; one that ends behind the answer is not."""
    assert spelled(tokenizer, tokenizer.encode(" Yes")) == ["▁Yes"]
    document = one({"messages": [USER, bot("Yes")]}, tokenizer, SPACED)
    trained = document.completions[0][document.weights[0] > 0]
    assert spelled(tokenizer, trained) == ["▁Yes", "</s>"]
    assert spelled(tokenizer, tokenizer.encode(" France")) == ["▁France"]
    cut = "{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}{{ 'ce' }}"
    document = one({"messages": [USER, bot(" No Fran")]}, tokenizer, cut)
    assert spelled(tokenizer, document.completions[0])[-1] == "▁France"
    assert trained_text(tokenizer, document) == "No"


def test_prompt_and_completion_as_text(tokenizer):
    document = one({"prompt": "Who wrote Emma?", "completion": " Jane Austen"}, tokenizer)
    assert tokenizer.decode(document.completions[0], skip_special=False) == "<s> Who wrote Emma? Jane Austen</s>"
    assert trained_text(tokenizer, document) == "Jane Austen</s>"


def test_prompt_and_completion_as_messages_train_the_completion_alone(tokenizer):
    record = {"prompt": [USER, bot("Paris."), USER], "completion": [bot("Yes.")]}
    for template in (MARKED, load_template("plain", tokenizer)):
        assert trained_text(tokenizer, one(record, tokenizer, template)) in ("Yes.<bot>", "Yes.</s>")


PAIRS = [
    {"prompt": [USER], "chosen": [bot("Paris.")], "rejected": [bot("Maybe not.")]},
    {"prompt": [USER], "chosen": [bot("Yes.")], "rejected": [bot("Yes, surely.")]},  # begin alike
    {"prompt": [USER, bot("No."), USER], "chosen": [bot("Yes")], "rejected": [bot("No")]},
    {"chosen": [USER, bot("Paris.")], "rejected": [USER, bot("Paris"), USER, bot("Paris.")]},
]


@pytest.mark.parametrize("template", [SPACED, MARKED, None], ids=["spaced", "marked", "plain"])
@pytest.mark.parametrize("record", PAIRS)
def test_a_pair_is_its_two_dialogues_with_the_prompt_once(tokenizer, record, template):
    """Prompt + completion is what tokenising the whole dialogue gives; trained are the completion's answers."""
    template = load_template("plain", tokenizer) if template is None else Template(template, tokenizer)
    document = one(record, tokenizer, template)
    assert len(document.completions) == 2 and len(document.prompt) >= 1 and document.prompt.dtype == np.int32
    prompt = record.get("prompt", [])
    for n, name in enumerate(("chosen", "rejected")):
        whole = one({"messages": prompt + record[name]}, tokenizer, template)
        assert np.concatenate([document.prompt, document.completions[n]]).tolist() == whole.completions[0].tolist()
        alone = one({"prompt": prompt or [USER], "completion": record[name][0 if prompt else 1 :]}, tokenizer, template)
        assert document.weights[n].tolist() == alone.weights[0][len(document.prompt) :].tolist()
        assert alone.weights[0][: len(document.prompt)].sum() == 0
        assert document.weights[n][-1] == 1


def test_a_shared_prompt_ends_before_a_token_that_an_answer_changes(tokenizer):
    document = one(PAIRS[2], tokenizer, SPACED)
    assert spelled(tokenizer, document.prompt)[-1] == ":"  # the space after it is part of "▁Yes" and "▁No"
    assert [spelled(tokenizer, c)[0] for c in document.completions] == ["▁Yes", "▁No"]
    document = one({"prompt": "in Fran", "chosen": "ce", "rejected": "?"}, tokenizer)
    assert "▁France" not in spelled(tokenizer, document.prompt)
    chosen, rejected = (tokenizer.decode([*document.prompt, *c], False) for c in document.completions)
    assert (chosen, rejected) == ("<s> in France</s>", "<s> in Fran?</s>")
    assert spelled(tokenizer, document.completions[0]) == ["▁France", "</s>"]
    assert document.weights[0].tolist() == [1, 1] and document.weights[1][-2:].tolist() == [1, 1]
    assert document.weights[1][:-2].sum() == 0  # the end of the prompt, which could not be shared


def test_a_shared_prompt_ends_where_either_answer_is_trained(tokenizer):
    """A template may mark more of one answer than of the other."""
    template = (
        "{% for m in messages %}{% if m.content == 'A' %}{{ ' Yes' }}{% generation %}{{ ' No' }}{% endgeneration %}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ ' Yes No No' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    for chosen, rejected in (("A", "B"), ("B", "A")):
        document = one({"prompt": [USER], "chosen": [bot(chosen)], "rejected": [bot(rejected)]}, tokenizer, template)
        assert "▁Yes" not in spelled(tokenizer, document.prompt)
        kept = {chosen: document.weights[0].tolist(), rejected: document.weights[1].tolist()}
        assert kept == {"A": [0, 1], "B": [1, 1, 1]}


def test_answers_that_begin_alike_keep_their_beginning(tokenizer):
    document = one(PAIRS[1], tokenizer, load_template("plain", tokenizer))
    assert [tokenizer.decode(c, False) for c in document.completions] == ["Yes.</s>", "Yes, surely.</s>"]


# --- lengths --------------------------------------------------------------------------------------------------------


LONG = {"prompt": [USER], "completion": [bot("Paris.")]}
LONG_PAIR = PAIRS[0]


@pytest.mark.parametrize("record", [LONG, LONG_PAIR, {"prompt": "Who wrote Emma?", "completion": " Jane."}])
def test_truncation_cuts_the_prompt_from_the_left_and_no_completion(tokenizer, record):
    whole = one(record, tokenizer)
    longest = len(whole.prompt) + max(len(c) for c in whole.completions)
    first = len(whole.prompt) if not whole.linear else int(np.argmax(whole.weights[0]))
    answers = longest - first
    for max_tokens in range(2, longest + 2):
        if max_tokens < answers + 2:  # BOS and one token of the prompt stay
            with pytest.raises(ExampleFault, match="too_long"):
                run(record, tokenizer, max_tokens=max_tokens, on_long="truncate")
            continue
        encoded = run(record, tokenizer, max_tokens=max_tokens, on_long="truncate")
        (cut,) = encoded.documents
        assert encoded.truncated == (max_tokens < longest)
        lost = max(longest - max_tokens, 0)
        assert cut.transform.endswith(f", prompt cut by {lost} tokens" if lost else ", whole")
        for n in range(len(whole.completions)):
            before = [*whole.prompt, *whole.completions[n]]
            after = [*cut.prompt, *cut.completions[n]]
            assert after == before[:1] + before[1 + lost :] and after[0] == tokenizer.bos_id
            assert cut.weights[n].sum() == whole.weights[n].sum()
        if lost:
            with pytest.raises(ExampleFault) as fault:
                run(record, tokenizer, max_tokens=max_tokens, on_long="drop")
            assert fault.value.reason == "too_long" and fault.value.origin == HERE


def test_without_bos_the_prompts_first_token_goes_first(write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer(add_bos_token=False, bos_token=None))
    whole = one(LONG, tokenizer).completions[0]
    cut = one(LONG, tokenizer, max_tokens=len(whole) - 3, on_long="truncate").completions[0]
    assert cut.tolist() == whole[3:].tolist()


def test_the_first_token_has_nothing_to_be_predicted_from(write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer(add_bos_token=False))
    document = one({"prompt": "", "completion": "Yes"}, tokenizer)
    assert spelled(tokenizer, document.completions[0]) == ["▁Yes", "</s>"]
    assert document.weights[0].tolist() == [0, 1]


@pytest.mark.parametrize("max_tokens", [2, 3, 7, 1000])
@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_raw_text_is_cut_into_pieces_that_train_every_token_once(tokenizer, max_tokens, on_long):
    text = "Who wrote Emma? Jane Austen wrote it. Yes."
    encoded = run({"text": text}, tokenizer, max_tokens=max_tokens, on_long=on_long)
    assert not encoded.truncated
    whole = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert all(d.linear and len(d.completions[0]) <= max_tokens and d.weights[0][0] == 0 for d in encoded.documents)
    assert all(d.weights[0][1:].all() for d in encoded.documents)
    targets = [t for d in encoded.documents for t in d.completions[0][1:].tolist()]
    assert targets == whole[1:]
    count = len(encoded.documents)
    pieces = [f"text, piece {n} of {count}" for n in range(1, count + 1)]
    assert [d.transform for d in encoded.documents] == (pieces if count > 1 else ["text, whole"])
    before = [t for d in encoded.documents for t in d.completions[0][:-1].tolist()]
    assert before == whole[:-1]  # and each is predicted from the one before it


def test_raw_text_that_ends_with_eos_gets_no_second_one(tokenizer):
    document = one({"text": "Yes.</s>"}, tokenizer)
    assert (document.completions[0] == tokenizer.eos_id).sum() == 1


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, template, reason",
    [
        (
            {"messages": [USER, bot("Yes.")]},
            "{% generation %}{% endgeneration %}{{ messages[1].content }}",
            "empty_mask",
        ),
        ({"messages": [USER, bot("Yes.")]}, "{{ raise_exception('no') }}", "template_refused"),
        (
            {"prompt": [USER], "chosen": [bot("Yes")], "rejected": [bot("Yes ")]},
            "{% for m in messages %}{{ m.content | trim + eos_token }}{% endfor %}",
            "chosen_equals_rejected",
        ),
    ],
)
def test_faults(tokenizer, record, template, reason):
    with pytest.raises(ExampleFault) as fault:
        run(record, tokenizer, template)
    assert fault.value.reason == reason and str(fault.value).startswith("data.jsonl:3: ")


def test_a_pair_needs_a_prompt(write_tokenizer):
    tokenizer = load_tokenizer(write_tokenizer(add_bos_token=False))
    with pytest.raises(ExampleFault, match="no_prompt"):
        run({"prompt": "", "chosen": "Yes", "rejected": "No"}, tokenizer)


# --- rankings, unpaired feedback, prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [SPACED, MARKED])
def test_a_ranking_shares_its_prompt_among_all(tokenizer, template):
    """Each completion is as it is alone; the scores go with their completions, best first."""
    answers = ["No.", "Yes.", "Paris, surely."]
    record = {"prompt": [USER], "completions": [[bot(a)] for a in answers], "scores": [0, 0.5, 2]}
    document = one(record, tokenizer, template)
    assert document.completion == {"score": (2.0, 0.5, 0.0)} and len(document.prompt) > 1
    for n, answer in enumerate(reversed(answers)):
        whole = one({"prompt": [USER], "completion": [bot(answer)]}, tokenizer, template)
        assert [*document.prompt, *document.completions[n]] == whole.completions[0].tolist()
        assert [*np.zeros(len(document.prompt)), *document.weights[n]] == whole.weights[0].tolist()


def test_a_pair_as_a_ranking_has_the_same_tokens(tokenizer):
    example = parse(PAIRS[1], HERE, kind="ranking")
    template = Template(SPACED, tokenizer)
    options = {"template": template, "tokenizer": tokenizer, "max_tokens": 100, "on_long": "drop"}
    (document,) = encode(example, 5, **options).documents
    pair = one(PAIRS[1], tokenizer, template)
    assert document.completion == {"score": (1.0, 0.0)} and pair.completion == {}
    for ours, theirs in zip((document.prompt, *document.completions), (pair.prompt, *pair.completions), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_feedback_is_one_branch_with_a_label(tokenizer, label):
    record = {"messages": [USER, bot("No."), USER, bot("Yes.")], "label": label}
    document = one(record, tokenizer, load_template("plain", tokenizer))
    assert document.completion == {"label": (float(label),)} and len(document.completions) == 1
    assert trained_text(tokenizer, document) == "Yes.</s>"
    assert tokenizer.decode(document.prompt, False).endswith("Assistant:") and document.weights[0].all()


def test_a_pair_is_a_good_and_a_bad_answer_as_well(tokenizer):
    """Read as unpaired feedback: two documents, each as the pair's branch; their values go with them."""
    template = Template(SPACED, tokenizer)
    example = parse(PAIRS[1], HERE, kind="unpaired")
    options = {"template": template, "tokenizer": tokenizer, "max_tokens": 100, "on_long": "drop"}
    documents = encode(example, 5, **options).documents
    pair = one(PAIRS[1], tokenizer, template)
    assert [d.completion for d in documents] == [{"label": (1.0,)}, {"label": (0.0,)}]
    assert [d.transform for d in documents] == [f"{example.format}, answer {n} of 2" for n in (1, 2)]
    for document, whole in zip(documents, pair.completions, strict=True):
        assert [*document.prompt, *document.completions[0]] == [*pair.prompt, *whole]


def test_a_prompt_ends_where_the_model_answers(tokenizer):
    template = load_template("plain", tokenizer)
    document = one({"prompt": [USER]}, tokenizer, template)
    assert document.prompt.tolist() == template.encode([USER], tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(document.prompt, False) == "<s>User: What is the capital of France?\nAssistant:"
    assert document.completions == document.weights == ()
    raw = one({"prompt": "Who wrote Emma?"}, tokenizer)
    assert tokenizer.decode(raw.prompt, False) == "<s> Who wrote Emma?"
    cut = run({"prompt": "Who wrote Emma?"}, tokenizer, max_tokens=4, on_long="truncate")
    assert cut.truncated and cut.documents[0].prompt.tolist() == [raw.prompt[0], *raw.prompt[-3:]]
    with pytest.raises(ExampleFault, match="too_long"):
        run({"prompt": "Who wrote Emma?"}, tokenizer, max_tokens=4)


def test_completions_with_the_same_tokens_are_a_fault(tokenizer):
    record = {"prompt": [USER], "completions": [[bot("Yes")], [bot("No")], [bot("Yes ")]]}
    trimming = "{% for m in messages %}{{ m.content | trim + eos_token }}{% endfor %}"
    with pytest.raises(ExampleFault) as fault:
        run(record, tokenizer, trimming)
    assert fault.value.reason == "equal_completions"


# ---- answers of several steps ----


STEPS = ["2 + 2 is 4.", "4 + 3 is 8.", "4 + 3 is 8."]
STEPWISE = {"completions": STEPS, "labels": [True, False, 0.25]}


@pytest.mark.parametrize("prompt", ["What is 2 + 2 + 3? ", [USER]])
def test_labels_stand_at_the_last_token_of_each_step(prompt, tokenizer):
    document = one({"prompt": prompt, **STEPWISE}, tokenizer, load_template("plain", tokenizer))
    (ids,), (step,), (label,) = document.completions, document.token["step"], document.token["label"]
    places = np.flatnonzero(step)
    assert label[places].tolist() == [1.0, 0.0, 0.25] and not label[step == 0].any()
    so_far = [tokenizer.decode(ids[: place + 1], skip_special=True) for place in places]
    for number, text in enumerate(so_far, start=1):
        assert text.rstrip().endswith("\n".join(STEPS[:number]))


def test_a_cut_prompt_leaves_labels_where_the_steps_end(tokenizer):
    record, template = {"prompt": [USER], **STEPWISE}, load_template("plain", tokenizer)
    whole = one(record, tokenizer, template)
    most = len(whole.completions[0]) - 3
    cut = one(record, tokenizer, template, max_tokens=most, on_long="truncate")
    for name in ("step", "label"):
        np.testing.assert_array_equal(cut.token[name][0][1:], whole.token[name][0][4:])


def test_steps_that_a_template_rewrites_are_a_fault(tokenizer):
    shouting = MARKED.replace("m.content", "(m.content | upper)")
    with pytest.raises(ExampleFault, match="steps_not_shown"):
        one({"prompt": [USER], **STEPWISE}, tokenizer, shouting)
