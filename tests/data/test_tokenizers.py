"""Tokenizers: ids, spans and texts of stories260K are what transformers 5.23's LlamaTokenizer gives (legacy=false)."""

import gzip
import json
import re

import pytest

from jaxpost.data.tokenizers import load_tokenizer
from jaxpost.errors import DataError
from tests.shared import SHARED, needs_shared

# text, ids, spans, decoded with special tokens, and without
GOLDEN = [
    ("Hello", [346, 306, 414], [(0, 2), (2, 4), (4, 5)], "Hello", "Hello"),
    (" Hello", [346, 306, 414], [(0, 3), (3, 5), (5, 6)], "Hello", "Hello"),
    (
        "<s>Hello</s>World",
        [1, 440, 411, 306, 414, 2, 448, 304, 341],
        [(0, 3), (3, 4), (4, 5), (5, 7), (7, 8), (8, 12), (12, 13), (13, 15), (15, 17)],
        "<s>Hello</s>World",
        "HelloWorld",
    ),
    (
        "<s> Hello</s> World",
        [1, 346, 306, 414, 2, 410, 448, 304, 341],
        [(0, 3), (3, 6), (6, 8), (8, 9), (9, 13), (13, 14), (14, 15), (15, 17), (17, 19)],
        "<s> Hello</s> World",
        "Hello World",
    ),
    ("a<unk>b", [261, 0, 430], [(0, 1), (1, 6), (6, 7)], "a<unk>b", "ab"),
    (
        "yes</s>User: é 😀",
        [348, 406, 2, 471, 419, 285, 467, 410, 485, 410, 243, 162, 155, 131],
        [(0, 1), (1, 3), (3, 7), (7, 8), (8, 9), (9, 11), (11, 12), (12, 13), (13, 14), (14, 15), *[(15, 16)] * 4],
        "yes</s>User: é 😀",
        "yesUser: é 😀",
    ),
    ("", [], [], "", ""),
    (" ", [410], [(0, 1)], "", ""),
    (
        "  two  spaces ",
        [410, 259, 424, 414, 410, 262, 427, 412, 331, 419, 410],
        [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 12), (12, 13), (13, 14)],
        " two  spaces ",
        " two  spaces ",
    ),
    ("\n\nHi", [410, 13, 13, 440, 417], [(0, 1), (0, 1), (1, 2), (2, 3), (3, 4)], "\n\nHi", "\n\nHi"),
    ("</s>\nUser", [2, 13, 471, 419, 285], [(0, 4), (4, 5), (5, 6), (6, 7), (7, 9)], "</s>\nUser", "\nUser"),
    ("x </s> y", [410, 444, 410, 2, 348], [(0, 1), (0, 1), (1, 2), (2, 6), (6, 8)], "x </s> y", "x  y"),
]


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer(SHARED / "models/stories260K")


@needs_shared
@pytest.mark.parametrize("text, ids, spans, decoded, plain", GOLDEN, ids=[repr(row[0]) for row in GOLDEN])
def test_stories_as_transformers(stories, text, ids, spans, decoded, plain):
    found, offsets = stories.encode_with_offsets(text)
    assert found == ids == stories.encode(text)
    assert offsets == spans
    assert stories.decode(ids, skip_special=False) == decoded
    assert stories.decode(ids) == plain


@needs_shared
def test_stories_settings_and_the_length_of_its_sample(stories):
    assert (stories.vocab_size, stories.bos_id, stories.eos_id, stories.pad_id) == (512, 1, 2, None)
    assert stories.adds_bos and stories.stop_ids == (2,) and stories.chat_template is None
    text = (SHARED / "models/stories260K/sample.txt").read_text()[:700]
    ids = stories.with_bos(stories.encode(text))
    assert len(ids) == 363  # as its README says
    assert ids[:8] == [1, 410, 13, 441, 416, 331, 407, 261] and ids[-5:] == [272, 277, 264, 261, 416]
    assert set(stories.files()) == {"tokenizer.model", "tokenizer_config.json"}


@needs_shared
@pytest.mark.parametrize(
    "path, size, bos, eos",
    [
        ("deepseek_r1", 128815, 0, 1),
        ("mistral/tokenizer.model.v1", 32000, 1, 2),
        ("mistral/mistral_instruct_tokenizer_240323.model.v3", 32768, 1, 2),
        ("t5_c4_default", 32768, 1, 2),
    ],
)
def test_real_tokenizers_give_every_character_back(path, size, bos, eos):
    tokenizer = load_tokenizer(SHARED / "data/tokenizers" / path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    text = "A naïve café, 12 people and one <unicorn>."
    ids, spans = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    starts, ends = zip(*spans, strict=True)
    assert starts[0] == 0 and ends[-1] == len(text) and list(ends) == sorted(ends)
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text)))


@needs_shared
def test_control_pieces_of_a_real_model_are_split_out():
    """Mistral v3 has [INST] as control piece; text after it gets no second dummy space."""
    tokenizer = load_tokenizer(SHARED / "data/tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3")
    ids = tokenizer.encode("<s>[INST] Hi[/INST]")
    assert [tokenizer.token(i) for i in ids] == ["<s>", "[INST]", "▁Hi", "[/INST]"]


def test_legacy_puts_a_space_after_each_special_token(write_tokenizer):
    new, old = (load_tokenizer(write_tokenizer(legacy=legacy)) for legacy in (False, True))
    spelled = lambda tokenizer, text: [tokenizer.token(i) for i in tokenizer.encode(text)]  # noqa: E731
    assert "".join(spelled(new, "<user>Yes<bot>No")) == "<user>Yes<bot>No"
    assert "".join(spelled(old, "<user>Yes<bot>No")) == "<user>▁Yes<bot>▁No"
    assert "".join(spelled(old, "Yes")) == "".join(spelled(new, "Yes")) == "▁Yes"
    assert "".join(spelled(new, " Yes")) == "▁Yes"  # never doubled
    assert new.fingerprint != old.fingerprint


def test_tokens_added_beside_the_model(write_tokenizer, tokenizer):
    size = tokenizer.vocab_size
    decoder = {str(size): {"content": "<|end|>", "special": True, "rstrip": True}}
    folder = write_tokenizer(added_tokens_decoder=decoder)
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": size + 1}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<extra>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size]}))
    added = load_tokenizer(folder)
    assert added.vocab_size == size + 2 and added.pad_id == size + 1 and added.stop_ids == (2, size)
    ids, spans = added.encode_with_offsets("Yes<|end|>  No")
    at = ids.index(size)
    assert spans[at] == (3, 12)  # rstrip: it swallows the white space behind it
    assert added.token(ids[at + 1]).startswith("N")
    assert added.decode(ids) == "YesNo" and added.is_special(size)
    assert set(added.files()) >= {"added_tokens.json", "special_tokens_map.json"}


def test_a_tokenizer_json_reads_special_tokens_and_forgets_truncation(tmp_path, json_bytes):
    (tmp_path / "tokenizer.json").write_bytes(json_bytes)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 0 and tokenizer.adds_bos  # its post-processor says so
    text = "<|user|>Who wrote Emma? é😀<|end|>"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert len(ids) > 8 and ids[0] == 2 and ids[-1] == 3
    assert spans[0] == (0, 8) and spans[-1] == (len(text) - 7, len(text))
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "Who wrote Emma? é😀"
    assert tokenizer.with_bos(ids)[0] == 0 and tokenizer.with_bos([0, 5]) == [0, 5]
    assert tokenizer.is_special(3) and not tokenizer.is_special(ids[1])


def test_config_decides_about_bos_and_templates(write_tokenizer):
    none = load_tokenizer(write_tokenizer(bos_token=None))
    assert none.bos_id is None and not none.adds_bos and none.with_bos([5]) == [5]
    assert not load_tokenizer(write_tokenizer(add_bos_token=False)).adds_bos
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    assert load_tokenizer(write_tokenizer(chat_template=named)).chat_template == "A"
    folder = write_tokenizer(chat_template="A")
    (folder / "chat_template.jinja").write_text("C")  # the file goes before the key, as in transformers
    assert load_tokenizer(folder).chat_template == "C"


def test_ids_beyond_the_pieces_are_passed_over(tokenizer):
    """A model's vocabulary may be padded, and an untrained model samples from the padding."""
    ids = tokenizer.encode("Yes")
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 7]) == "Yes"
    assert tokenizer.token(tokenizer.vocab_size + 7) == f"<{tokenizer.vocab_size + 7}>"


def test_one_file_and_gz(tmp_path, json_bytes, write_tokenizer):
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(json_bytes))
    packed = load_tokenizer(tmp_path / "tokenizer.json.gz")
    assert packed.files()["tokenizer.json"] == json_bytes
    folder = write_tokenizer()
    one, whole = load_tokenizer(folder / "tokenizer.model"), load_tokenizer(folder)
    assert one.encode("Who?") == whole.encode("Who?") and one.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer in this folder"),
        ({"tokenizer.json": b"{}"}, "not a tokenizer.json"),
        ({"tokenizer.model": b"no such thing"}, "neither a sentencepiece model nor a tokenizer.json"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"{"}, "tokenizer_config.json: broken JSON"),
    ],
)
def test_faulty_folders(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_path_and_missing_special_token(tmp_path, write_tokenizer):
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="eos_token '<stop>' is not in the vocabulary"):
        load_tokenizer(write_tokenizer(eos_token="<stop>"))
