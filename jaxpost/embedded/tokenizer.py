"""The tokenizer of the embedded world: sentencepiece unigram, 1,144 pieces, in the two forms that loaders know.

No dummy prefix: "France" is one piece after a space wherever it stands, and text after a chat token is tokenised like
text at the start of a document, by sentencepiece and by Hugging Face's tokenizers alike. A newline is its byte piece.
"""

import collections
import io
import json
import math
import re
from collections.abc import Iterable

import sentencepiece
import tokenizers

PIECES = 1144
UNKNOWN, BOS, END, PAD = "<unk>", "<s>", "<|end|>", "<pad>"  # ids 0 to 3; the end of a turn is also the end of a text
CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|result|>")

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(texts: Iterable[str]) -> bytes:
    """The sentencepiece model (the bytes of `tokenizer.model`) of these texts. The same texts give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_words(texts)),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
        unk_piece=UNKNOWN,
        bos_piece=BOS,
        eos_piece=END,
        pad_piece=PAD,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=list(CHAT),
        num_threads=1,  # more would make the order of pieces depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def _words(texts: Iterable[str]) -> list[str]:
    """The words of the texts as lines for sentencepiece, the square root of their count often, with their space.

    Unigram training takes its candidates from substrings that are followed by different characters. In so regular a
    text " of" is always followed by a space and would never be one, so each word also comes before a stop.
    """
    counts = collections.Counter(word for text in texts for word in re.findall(r" ?[A-Za-z']+|[^A-Za-z' \n]", text))
    lines = []
    for word, count in counts.items():
        lines += [word, word + "."] * math.isqrt(count) if word[-1].isalpha() else [word] * math.isqrt(count)
    return lines


def as_json(model: bytes) -> str:
    """The same tokenizer as a `tokenizer.json`, for loaders that do not read sentencepiece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=0, byte_fallback=True))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    special = [UNKNOWN, BOS, END, PAD, *CHAT]
    fast.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, special.index(BOS))]
    )
    return fast.to_str(pretty=False)


def tokenizer_config() -> dict:
    """`tokenizer_config.json`: names of the special tokens and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "unk_token": UNKNOWN,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }


def files(texts: Iterable[str]) -> dict[str, bytes]:
    """The three tokenizer files of a Hugging Face model folder."""
    model = train(texts)
    return {
        "tokenizer.model": model,
        "tokenizer.json": as_json(model).encode(),
        "tokenizer_config.json": (json.dumps(tokenizer_config(), indent=1) + "\n").encode(),
    }
