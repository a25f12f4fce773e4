"""A small tokenizer of each kind, made once: chat tokens, byte fallback, a dummy prefix space like Llama's."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from jaxpost.data.tokenizers import load_tokenizer

TEXTS = [
    "Yes No France " * 20,  # these become one piece each
    "What is the capital of France? The capital of France is Paris.",
    "Who wrote Emma? Jane Austen wrote it. Yes. No. Maybe not, but surely yes.",
    "User: hello there\nAssistant: good morning to you, and a fine day it is.",
]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "legacy": False}


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TEXTS).split("\n")),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "user_defined_symbols": ["<user>", "<bot>"]},
        **{
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            "num_threads": 1,
        },
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def model_bytes():
    return sentencepiece_model()


@pytest.fixture
def write_tokenizer(tmp_path, model_bytes):
    """write_tokenizer(**settings) -> a folder with the small sentencepiece model and this tokenizer_config.json."""

    def write(**settings):
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model_bytes)
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | settings))
        return folder

    return write


@pytest.fixture
def tokenizer(write_tokenizer):
    return load_tokenizer(write_tokenizer())


@pytest.fixture(scope="session")
def json_bytes():
    """tokenizer.json of a byte-level BPE whose post-processor adds BOS; it remembers somebody's truncation."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(4)
    made.enable_padding(length=8)
    return made.to_str().encode()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*records, name="data.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return write
