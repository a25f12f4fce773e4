"""Templates: rendered text and generation blocks as transformers gives them; trained spans by hand and by agreement."""

import hashlib
import json
import pickle
import re

import pytest

from jaxpost.data.formats import ExampleFault
from jaxpost.data.templates import PLAIN, Template, load_template
from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.errors import DataError
from tests.shared import SHARED, needs_shared

TEMPLATES = SHARED / "data/chat_templates"
DIALOGUE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote <Emma>?"},
    {"role": "assistant", "content": "Jane Austen."},
    {"role": "user", "content": ' And "Persuasion"? '},
    {"role": "assistant", "content": "Jane Austen\nas well."},
)
USER, BOT = DIALOGUE[1], DIALOGUE[2]

# By transformers 5.23 with the tokenizer of stories260K: sha256 (16 digits) of the rendered dialogue, a NUL, and the
# dialogue without its last turn and with the generation prompt; then the words of its generation blocks.
GOLDEN = {
    "chujiezheng/chatml": ("0a208dda3807e7ac", None),
    "chujiezheng/llama-2-chat": ("e1a0a0ead53b8f1e", None),
    "chujiezheng/vicuna": ("6f414afc09b0df64", None),
    "chujiezheng/zephyr": ("a48e9f7e871070ef", None),
    "chujiezheng/mistral-instruct": ("c79d72191b1d436f", None),
    "trl/qwen2_5": ("5993ca8485eb812a", None),
    "trl/qwen2_5_training": (
        "5993ca8485eb812a",
        ["\nJane Austen.<|im_end|>\n", "\nJane Austen\nas well.<|im_end|>\n"],
    ),
    "trl/qwen3": ("2af39e7bd77009e3", None),
    "trl/qwen3_training": (
        "6fd91f30757982a3",
        [
            "<think>\n\n</think>\n\nJane Austen.<|im_end|>\n",
            "<think>\n\n</think>\n\nJane Austen\nas well.<|im_end|>\n",
        ],
    ),
    "trl/llama3": ("29d06e43f89e0ca5", None),
    "trl/llama3_training": ("29d06e43f89e0ca5", ["Jane Austen.<|eot_id|>", "Jane Austen\nas well.<|eot_id|>"]),
    "trl/gemma3": ("c8c1dcd3b50814e6", None),
    "trl/deepseekv3": ("9cb8877ea307a297", None),
    "trl/phi3": ("384a55b28a5ad688", None),
    "trl/phi3_training": ("384a55b28a5ad688", ["Jane Austen.<|end|>\n", "Jane Austen\nas well.<|end|>\n", "</s>"]),
    "trl/lfm2": ("0a086491a1759540", None),
    "trl/nemotron_3_nano": ("c0fa94b7575f4479", None),
    "trl/cohere2_training": (
        "93c301b042958e8b",
        [
            "Jane Austen.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "Jane Austen\nas well.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
    ),
    "trl/glm4moe_training": (
        "646f096fd6724cdb",
        ["\n<think></think>\nJane Austen.<|user|>", "\n<think></think>\nJane Austen\nas well.<|user|>"],
    ),
}


def words(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer(SHARED / "models/stories260K")


@needs_shared
@pytest.mark.parametrize("name", GOLDEN)
def test_real_templates_as_transformers(stories, name):
    digest, blocks = GOLDEN[name]
    template = load_template(TEMPLATES / f"{name}.jinja", stories)
    rendered = template.render(DIALOGUE)
    asking = template.render(DIALOGUE[:4], add_generation_prompt=True)
    assert hashlib.sha256(f"{rendered.text}\0{asking.text}".encode()).hexdigest()[:16] == digest
    assert asking.spans == ()
    assert template.marks_generation == (blocks is not None)
    if blocks is not None:
        assert words(rendered) == blocks


@needs_shared
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*/*.jinja")), ids=lambda path: path.stem)
def test_every_real_template_trains_the_assistants_words_alone(stories, path):
    """Each answer lies in exactly one span; no span holds a word of the user or of the system."""
    template = load_template(path, stories)
    messages = DIALOGUE if path.stem not in ("gemma", "gemma_training") else DIALOGUE[1:]  # these know no system
    rendered = template.render(messages)
    trained = words(rendered)
    for answer in ("Jane Austen.", "Jane Austen\nas well."):
        assert sum(answer in part for part in trained) == 1
    assert not any(word in part for part in trained for word in ("wrote", "Persuasion", "brief", "Question"))
    last = template.render(messages, trained_from=len(messages) - 1)
    assert words(last)[0] in trained and "as well." in "".join(words(last)) and "Austen." not in "".join(words(last))


def with_tokens(write_tokenizer, tokenizer, *tokens):
    """The small tokenizer with these special tokens added."""
    size = tokenizer.vocab_size
    decoder = {str(size + i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    return load_tokenizer(write_tokenizer(added_tokens_decoder=decoder))


@needs_shared
@pytest.mark.parametrize(
    "model, tokens",
    [
        ("qwen2_5", ["<|im_start|>", "<|im_end|>"]),
        ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("gemma3", ["<start_of_turn>", "<end_of_turn>"]),
        ("phi3", ["<|user|>", "<|assistant|>", "<|end|>"]),
        ("cohere2", ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]),
    ],
)
def test_differences_of_renderings_agree_with_generation_blocks(write_tokenizer, tokenizer, model, tokens):
    """TRL's training templates are the originals with blocks: the same words must come out, but for white space."""
    tokenizer = with_tokens(write_tokenizer, tokenizer, *tokens)
    plain, marked = (load_template(TEMPLATES / f"trl/{model}{kind}.jinja", tokenizer) for kind in ("", "_training"))
    assert not plain.marks_generation and marked.marks_generation
    one, two = plain.render(DIALOGUE), marked.render(DIALOGUE)
    assert one.text == two.text
    squeezed = ["".join("".join(words(rendered)).split()) for rendered in (one, two)]
    assert squeezed[0] == squeezed[1]


CHATML = (
    "{% for m in messages %}{{ '<user>' + m.role + '\n' + m.content + '<bot>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>assistant\n' }}{% endif %}"
)
# Earlier answers lose what they thought, as in Qwen3.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "{{ '<user>assistant\n' + m.content.split('</think>')[-1] + '<bot>\n' }}"
    "{% else %}{{ '<user>' + m.role + '\n' + m.content + '<bot>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"


def test_white_space_behind_the_end_of_turn_is_not_trained(tokenizer):
    assert words(Template(CHATML, tokenizer).render(DIALOGUE)) == ["Jane Austen.<bot>", "Jane Austen\nas well.<bot>"]


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    thought = [m | {"content": "<think>J</think>" * (m["role"] == "assistant") + m["content"]} for m in DIALOGUE]
    rendered = Template(THINKING, tokenizer).render(thought)
    assert "<think>" in rendered.text and rendered.text.count("<think>") == 1
    assert words(rendered) == ["Jane Austen.<bot>", "<think>J</think>Jane Austen\nas well.<bot>"]


def test_without_a_generation_prompt_the_header_is_learnt(tokenizer):
    rendered = Template(NO_PROMPT, tokenizer).render((USER, BOT))
    assert words(rendered) == ["[assistant]Jane Austen.</s>"]


def test_the_assistant_may_begin(tokenizer):
    """Also where the template refuses an empty list: nothing but the answer is trained."""
    refusing = "{{ messages[0].role[:0] }}" + CHATML
    for source in (CHATML, refusing):
        assert words(Template(source, tokenizer).render((BOT, USER, BOT))) == ["Jane Austen.<bot>"] * 2


def test_a_prompt_that_is_refused_never_trains_what_comes_before(tokenizer):
    """A template that gives no generation prompt after an assistant's turn, and a second turn of the assistant."""
    strict = (
        "{% if add_generation_prompt and messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        + CHATML
    )
    rendered = Template(strict, tokenizer).render((USER, BOT, BOT | {"content": "Really."}))
    assert words(rendered) == ["Jane Austen.<bot>", "Really.<bot>"]


def test_trained_from_leaves_earlier_turns_out(tokenizer):
    marked = CHATML.replace(
        "m.content + '<bot>\n' }}", "'' }}{% generation %}{{ m.content + '<bot>' }}{% endgeneration %}"
    )
    for source in (CHATML, THINKING, marked):
        rendered = Template(source, tokenizer).render(DIALOGUE, trained_from=4)
        assert words(rendered)[-1] == "Jane Austen\nas well.<bot>" and "Austen." not in "".join(words(rendered))


def test_plain(tokenizer):
    template = load_template("plain", tokenizer)
    rendered = template.render((*DIALOGUE[:4], BOT))
    assert rendered.text == (
        "<s>System: Be brief.\nUser: Who wrote <Emma>?\nAssistant: Jane Austen.</s>"
        'User:  And "Persuasion"? \nAssistant: Jane Austen.</s>'
    )
    assert words(rendered) == [" Jane Austen.</s>", " Jane Austen.</s>"]
    asking = template.render(DIALOGUE[:2], add_generation_prompt=True).text
    assert asking.endswith("User: Who wrote <Emma>?\nAssistant:") and rendered.text.startswith(asking)
    assert template.files() == {"chat_template.jinja": PLAIN.encode()}


def test_plain_shows_tools_and_calls(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}, BOT)
    rendered = load_template("plain", tokenizer).render(messages, [{"type": "function", "function": {"name": "add"}}])
    assert rendered.text.startswith('<s>Tools: [{"type": "function", "function": {"name": "add"}}]\nUser: ')
    assert words(rendered) == [' Call: {"name": "add", "arguments": {"a": 1}}</s>', " Jane Austen.</s>"]
    assert "\nAssistant: Call" in rendered.text and "</s>Tool: 2\nAssistant: Jane" in rendered.text


def test_a_tokenizer_without_template_falls_back_with_a_warning(tokenizer, caplog):
    template = load_template(None, tokenizer)
    assert template.source == PLAIN
    assert "no chat template in tokenizer_config.json" in caplog.text and tokenizer.name in caplog.text


def test_where_a_template_comes_from(write_tokenizer, tmp_path, caplog):
    own = load_tokenizer(write_tokenizer(chat_template=CHATML))
    (tmp_path / "mine.jinja").write_text(NO_PROMPT)
    (tmp_path / "config.json").write_text(json.dumps({"chat_template": THINKING}))
    sources = [
        load_template(s, own).source for s in (None, str(tmp_path / "mine.jinja"), tmp_path / "config.json", "plain")
    ]
    assert sources == [CHATML, NO_PROMPT, THINKING, PLAIN]
    assert not caplog.text
    prints = {Template(s, own).fingerprint for s in sources}
    assert len(prints) == 4


def test_a_generation_prompt_that_the_text_does_not_begin_with_is_told(tokenizer, tmp_path, caplog):
    (tmp_path / "odd.jinja").write_text(CHATML.replace("<user>assistant\n", "<user>bot\n"))
    load_template(tmp_path / "odd.jinja", tokenizer)
    assert "odd.jinja: its generation prompt is not the beginning of the text trained on" in caplog.text


HEADER = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
SPACED = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}" + HEADER


def test_what_the_model_is_given_in_use_begins_the_training_text(tokenizer):
    """Compared in tokens: ": " + "Yes" is one text, but not the tokens of ": Yes"."""
    yes = BOT | {"content": "Yes"}
    assert Template(CHATML, tokenizer).generation_prefix_fault(DIALOGUE) is None
    assert Template(PLAIN, tokenizer).generation_prefix_fault((USER, yes)) is None
    assert (
        Template(SPACED, tokenizer)
        .render((USER, yes))
        .text.startswith(Template(SPACED, tokenizer).render((USER,), add_generation_prompt=True).text)
    )
    fault = Template(SPACED, tokenizer).generation_prefix_fault((USER, yes))
    assert fault.startswith("before message 2, the assistant's, the generation prompt gives 't: '"), fault
    assert fault.endswith("where the training text has 't: Yes'"), fault


def test_a_turn_that_is_rewritten_later_has_another_prompt_in_use(tokenizer):
    """A template that asks for thoughts and forgets those of earlier turns: honest for the last turn alone."""
    template = Template(
        THINKING.replace("<user>assistant\n' }}{% endif", "<user>assistant\n<think>' }}{% endif"), tokenizer
    )
    thought = [m | {"content": "<think>J</think>" * (m["role"] == "assistant") + m["content"]} for m in DIALOGUE]
    fault = template.generation_prefix_fault(thought)
    assert fault.startswith("before message 3,") and "\n" not in fault
    assert template.generation_prefix_fault(thought, trained_from=4) is None
    assert template.generation_prefix_fault(thought[:3]) is None


def test_a_prompt_that_is_refused_cannot_be_asked_for(tokenizer):
    refusing = "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}" + CHATML
    fault = Template(refusing, tokenizer).generation_prefix_fault((USER, BOT))
    assert fault == "message 2 cannot be asked for: chat template: no"
    assert Template(refusing, tokenizer).generation_prefix_fault((BOT,)) is None  # it begins: nothing asks for it


def test_jinja_is_set_up_as_in_transformers(tokenizer):
    def render(source):
        return Template(source, tokenizer).render((USER, BOT)).text

    assert (
        render("{% for m in messages %}\n  {% if loop.index == 2 %}\n    {% break %}\n  {% endif %}\nx\n{% endfor %}")
        == "x\n"
    )
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Who wrote <Emma>?"}'
    assert render("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 1,\n "b": "é"\n}'
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{{ tools is none }} {{ bos_token }}") == "True <s>"


@pytest.mark.parametrize("attack", ["{{ messages.__class__.__base__.__subclasses__() }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(tokenizer, attack):
    with pytest.raises(ExampleFault, match="template_refused"):
        Template(attack, tokenizer, "chat template evil").render((USER, BOT))


def test_a_templates_own_complaint_is_a_fault_of_the_example(tokenizer):
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must\nalternate') }}{% endif %}" + CHATML
    with pytest.raises(ExampleFault, match=r"chat template: Roles must alternate \(template_refused\)"):
        Template(source, tokenizer).render(DIALOGUE)


def test_a_turn_that_is_left_out_is_a_fault(tokenizer):
    source = "{% for m in messages if loop.last or m.role == 'user' %}{{ m.content + '<bot>' }}{% endfor %}"
    source = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content + '<bot>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ExampleFault, match="leaves out message 3, the assistant's") as fault:
        Template(source, tokenizer).render(DIALOGUE)
    assert fault.value.reason == "template_rewrites"


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content.strip() }}{% endif %}{% endfor %}",
            "never renders",
        ),
        ("hello", "never renders what the assistant says"),
        ("line\n{% if %}", "line 2"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
    ],
)
def test_faulty_templates(tokenizer, tmp_path, source, message):
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(DataError, match=message) as error:
        load_template(tmp_path / "bad.jinja", tokenizer)
    assert str(error.value).startswith(f"chat template {tmp_path}/bad.jinja: ") and "\n" not in str(error.value)


def test_missing_templates_and_a_block_that_cannot_be_traced(tokenizer, tmp_path, write_tokenizer):
    with pytest.raises(DataError, match="nowhere: no such chat template"):
        load_template("nowhere", tokenizer)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON file with the key chat_template"):
        load_template(tmp_path / "x.json", tokenizer)
    block = "{% generation %}{{ m.content }}{% endgeneration %}"
    macro = "{% macro say(m) %}[" + block + "]{% endmacro %}{{ 'a' }}{{ say(messages[1]) }}"
    with pytest.raises(DataError, match="cannot be traced"):
        Template(macro, tokenizer).render((USER, BOT))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_template_and_tokenizer_survive_pickling(write_tokenizer, json_bytes, tmp_path, name):
    """Tokenising processes get them so; what the checks of the template found out must come along."""
    if name == "tokenizer.json":
        (tmp_path / name).write_bytes(json_bytes)
    tokenizer = load_tokenizer(tmp_path if name == "tokenizer.json" else write_tokenizer())
    blocks = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
    for source in (PLAIN, blocks):
        template = Template(source, tokenizer)
        template.check()
        copy, tokens = pickle.loads(pickle.dumps((template, tokenizer)))
        assert copy.render(DIALOGUE) == template.render(DIALOGUE)
        assert (copy.fingerprint, tokens.fingerprint) == (template.fingerprint, tokenizer.fingerprint)
        assert tokens.encode_with_offsets("Who wrote Emma?") == tokenizer.encode_with_offsets("Who wrote Emma?")
