"""Writes the golden values of this folder, by `transformers` (5.23): run `python -m tests.data.golden.make` in an
environment of its own, which needs no jaxpost. The templates are read from ../shared and not copied.

templates.json: {template: {conversation: [text, ids, mask]}}, each 12 digits of a sha256; "refused" where the template
raises. text: the conversation, a NUL, and all but its last message with the generation prompt. ids: those of the
conversation. mask: `return_assistant_tokens_mask`, null where the template marks no assistant turns.
tokenizers.json: {template and real tokenizer: [ids, mask]} of one dialogue.
"""

import datetime
import gzip
import hashlib
import json
import pathlib
import re
import tempfile

import tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tests.data.golden.conversations import CONVERSATIONS

HERE = pathlib.Path(__file__).parent
TEMPLATES = pathlib.Path("../shared/data/chat_templates")
WHOLE_TEXTS = [("qwen3", "thinking"), ("llama3_1", "tool"), ("gptoss_training", "thinking"), ("deepseekv3", "tool")]
REAL = [  # template, tokenizer in ../shared/data/tokenizers
    ("trl/deepseekv3_training", "deepseek_r1/tokenizer.json.gz"),
    ("trl/qwen3_training", "deepseek_r1/tokenizer.json.gz"),
    ("trl/qwen2_5_training", "mistral/tokenizer.model.v1"),
    ("trl/lfm2_training", "mistral/mistral_instruct_tokenizer_240323.model.v3"),
]
DAY = datetime.datetime(2025, 2, 3)
CONTROL = (
    r"<\|\w+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_\w+>|<end_of_utterance>|<extra_id_\d>"
    r"|\[/?[A-Z_]+\]|</?think>|</?tool_\w+>"
)


class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return DAY


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def make_tokenizer(sources: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of the conversations' words, with all control tokens that the templates write."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = [str(message) for messages, _ in CONVERSATIONS.values() for message in messages]
    made.train_from_iterator(words * 4 + [re.sub(CONTROL, " ", source) for source in sources], trainer)
    for token in ["<s>", "</s>", *sorted({token for source in sources for token in re.findall(CONTROL, source)})]:
        special = not re.fullmatch(r"</?(think|tool_\w+)>", token)
        made.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return made


def arguments_as_text(messages):
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return messages


def as_blocks(messages):
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def golden(tokenizer, template: str, messages, tools, blocks: bool):
    """(text, prompt, ids, mask); None where the template raises."""
    options = {"chat_template": template, "tools": tools}
    asked, marks = messages[:-1], bool(re.search(r"\{\%-?\s*generation\s*-?\%\}", template))
    if blocks:
        messages, asked = as_blocks(messages), as_blocks(asked)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
    except TypeError:
        if isinstance(messages[-1].get("content"), str) and messages != (texts := arguments_as_text(messages)):
            return golden(tokenizer, template, texts, tools, blocks)
        return None
    except Exception as error:
        print("  refused:", repr(error)[:150])
        return None
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks, **options
    )
    return text, prompt, found["input_ids"], found["assistant_masks"] if marks else None


def main():
    chat_template_utils.datetime = Day
    files = sorted(TEMPLATES.glob("*/*.jinja"))
    (HERE / "tokenizer.json").write_text(make_tokenizer([file.read_text() for file in files]).to_str())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found = {}
    for file in files:
        name, template = f"{file.parent.name}/{file.stem}", file.read_text()
        print(name)
        plain = golden(tokenizer, template, *CONVERSATIONS["single"], False)
        blocks = plain is None or "Jane" not in plain[0]
        found[name] = {}
        for key, (messages, tools) in CONVERSATIONS.items():
            made = golden(tokenizer, template, messages, tools, blocks)
            found[name][key] = "refused"
            if made:
                text, prompt, ids, mask = made
                found[name][key] = [digest(f"{text}\0{prompt}"), digest(ids), mask and digest(mask)]
            if (file.stem, key) in WHOLE_TEXTS:
                (HERE / f"{file.stem}-{key}.txt").write_text(made[0])
    rows = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in row.items())
        + "\n }"
        for name, row in found.items()
    ]
    (HERE / "templates.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    real = {}
    for name, file in REAL:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = real_tokenizer(TEMPLATES.parent / "tokenizers" / file, pathlib.Path(folder))
        template = (TEMPLATES / f"{name}.jinja").read_text()
        made = golden(tokenizer, template, *CONVERSATIONS["dialogue"], False)
        real[f"{name} {file}"] = [digest(made[2]), made[3] and digest(made[3])]
    (HERE / "tokenizers.json").write_text(json.dumps(real, indent=1) + "\n")


def real_tokenizer(path: pathlib.Path, folder: pathlib.Path):
    if path.suffix == ".gz":
        (folder / "tokenizer.json").write_bytes(gzip.decompress(path.read_bytes()))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<｜begin▁of▁sentence｜>",
            eos_token="<｜end▁of▁sentence｜>",
        )
    (folder / "tokenizer.model").write_bytes(path.read_bytes())
    return LlamaTokenizer.from_pretrained(folder, legacy=False, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


if __name__ == "__main__":
    main()
