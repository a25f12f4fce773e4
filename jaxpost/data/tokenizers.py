"""Tokenizers: sentencepiece models and `tokenizer.json`, with the settings that lie beside them.

Both read special tokens written in the text as their ids and add nothing of their own, so that a rendered
conversation is tokenised once and as a whole. Sentencepiece text follows `transformers`' LlamaTokenizer: the dummy
space is put before the text's first character only (with `legacy`, after each special token too), and never doubled.
"""

import abc
import bisect
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence

import sentencepiece
import tokenizers
from etils import epath

from jaxpost.data.messages import ExampleFault
from jaxpost.errors import DataError

MODEL_FILES = ("tokenizer.json", "tokenizer.json.gz", "tokenizer.model")  # the first that is there is read
SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of jinja files beside chat_template.jinja
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

Offsets = list[tuple[int, int]]


def load_tokenizer(path) -> "Tokenizer":
    """The tokenizer of a folder in Hugging Face layout, or of one file (settings beside it are read too).

    Local or gs:// path. Raises DataError where there is no tokenizer, a file is broken, or a special token has no id.
    """
    given = epath.Path(path)
    if not given.exists():
        raise DataError(f"{path}: no such tokenizer file or folder")
    candidates = [given / name for name in MODEL_FILES] if given.is_dir() else [given]
    model = next((file for file in candidates if file.exists()), None)
    if model is None:
        raise DataError(f"{path}: no tokenizer in this folder; it must hold one of {', '.join(MODEL_FILES)}")
    content = model.read_bytes()
    if str(model).endswith(".gz"):
        content = gzip.decompress(content)
    # A folder may hold the same tokenizer in both forms; an export then does so too.
    names = (*SETTING_FILES, "tokenizer.json", "tokenizer.model") if given.is_dir() else SETTING_FILES
    beside = {name: (model.parent / name).read_bytes() for name in names if (model.parent / name).exists()}
    more = model.parent / NAMED_TEMPLATES
    beside |= {f"{NAMED_TEMPLATES}/{file.name}": file.read_bytes() for file in sorted(more.glob("*.jinja"))}
    settings = _Settings(str(path), model.parent, beside)
    kind = JsonTokenizer if content.lstrip()[:1] == b"{" else SentencePieceTokenizer
    return kind(content, settings)


def first_difference(one: "Tokenizer", other: "Tokenizer") -> int | None:
    """The first id that stands for different tokens; None where one vocabulary is the other's beginning."""
    shared = range(min(one.vocab_size, other.vocab_size))
    return next((index for index in shared if one.token(index) != other.token(index)), None)


def _read_json(name: str, content: bytes) -> dict:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{name}: broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: must hold a JSON object")
    return value


class _Settings:
    """What lies beside the model file: special tokens, added tokens, chat templates, ids at which to stop."""

    def __init__(self, name: str, folder: epath.Path, files: dict[str, bytes]):
        self.name, self.files = name, files
        parsed = {file: _read_json(f"{folder / file}", files[file]) for file in SETTING_FILES[:3] if file in files}
        self.config = parsed.get("tokenizer_config.json", {})
        self.added = parsed.get("added_tokens.json", {})
        special = parsed.get("special_tokens_map.json", {}) | self.config
        self.special = {key: _token_text(special[key]) for key in SPECIAL_NAMES if special.get(key)}
        self.extra = [_token_text(token) for token in special.get("additional_special_tokens") or []]
        self.none = {key for key in SPECIAL_NAMES if key in special and special[key] is None}
        self.ids = {"bos_token": [], "eos_token": []}  # of the model itself; EOS may be several, all of which stop
        for file in ("config.json", "generation_config.json"):
            if (folder / file).exists():
                found = _read_json(f"{folder / file}", (folder / file).read_bytes())
                for name, ids in self.ids.items():
                    value = found.get(f"{name}_id")
                    ids += value if isinstance(value, list) else [value] * (value is not None)
        self.templates = self._read_templates()

    def _read_templates(self) -> dict[str, str]:
        """By name; files come before what tokenizer_config.json says, as in `transformers`."""
        found = named_templates(self.config.get("chat_template"))
        if "chat_template.jinja" in self.files:
            found = {"default": self.files["chat_template.jinja"].decode()}
        paths = [path for path in self.files if path.startswith(f"{NAMED_TEMPLATES}/")]
        return found | {epath.Path(path).stem: self.files[path].decode() for path in paths}


def named_templates(value) -> dict[str, str]:
    """The key chat_template of tokenizer_config.json: one template, or a list of {"name", "template"}."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return {"default": value} if value else {}


def _token_text(token) -> str:
    return token["content"] if isinstance(token, dict) else token


class Tokenizer(abc.ABC):
    """Text to ids and back. Ids lie below `vocab_size`; bos_id, eos_id and pad_id are None where there is none.

    adds_bos: whether a sequence begins with BOS (written by the encoder where a template does not write it).
    stop_ids: every id that ends a turn: EOS, and those of config.json and generation_config.json.
    chat_template: jinja source, or None. fingerprint: sha256 of all that decides the ids.
    """

    def __init__(self, content: bytes, settings: _Settings, adds_bos: bool):
        self.name = settings.name
        self._settings, self._content = settings, content
        self.special_tokens = dict(settings.special)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.adds_bos = self.bos_id is not None and settings.config.get("add_bos_token", adds_bos)
        self.stop_ids = tuple(sorted({self.eos_id, *settings.ids["eos_token"]} - {None}))
        decisive = [self.bos_id, self.eos_id, self.adds_bos, settings.config.get("legacy"), sorted(self._special_ids())]
        self.fingerprint = hashlib.sha256(content + json.dumps(decisive).encode()).hexdigest()

    def __reduce__(self):
        """Pickled as what it was read from."""
        return type(self), (self._content, self._settings)

    def _special_id(self, name: str) -> int | None:
        """The id of a special token; falls back to what the model file and the model's own config say."""
        if name in self._settings.none:
            return None
        if name in self.special_tokens:
            index = self.token_id(self.special_tokens[name])
            if index is None:
                raise DataError(f"{self.name}: {name} {self.special_tokens[name]!r} is not in the vocabulary")
            return index
        known = self._settings.ids.get(name)
        index = known[0] if known else self._model_special_id(name)
        if index is not None:
            self.special_tokens[name] = self.token(index)
        return index

    @property
    def chat_template(self) -> str | None:
        return self._settings.templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """Named templates of tokenizer_config.json; a single one is called "default"."""
        return self._settings.templates

    def files(self) -> dict[str, bytes]:
        """The files that an exported checkpoint needs, as they were read (decompressed)."""
        return {self.model_file: self._content, **self._settings.files}

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a whole sequence with BOS in front, exactly once: a template may have written it already."""
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text: no BOS or EOS added; special tokens that are written in it become their ids."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str, breaks: Sequence[int] = ()) -> tuple[list[int], Offsets]:
        """Ids and, for each, the (start, end) characters it stands for; bytes of one character share its span.

        breaks: places (ascending) that no token goes across, so that a special token written there is plain text. A
        mark is put there and its tokens are taken out again; the text around it is tokenised as one.
        """
        if not breaks:
            return self._encode(text)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)  # for private use
        bounds = [0, *breaks, len(text)]
        marked = mark.join(text[start:end] for start, end in itertools.pairwise(bounds))
        marks = [place + number for number, place in enumerate(breaks)]
        ids, offsets = [], []
        for (start, end), group in itertools.groupby(zip(*self._encode(marked), strict=True), lambda pair: pair[1]):
            found = [index for index, _ in group]
            before, within = bisect.bisect_left(marks, start), bisect.bisect_left(marks, end)
            if 0 < end - start == within - before:  # a mark alone
                found = []
            elif before != within:  # unknown characters beside it share its span: a token for each of their bytes
                kept = [letter != mark for letter in marked[start:end] for _ in letter.encode()]
                if len(kept) != len(found):
                    detail = f"{self.name}: has a token that joins U+{ord(mark):04X} with text"
                    raise ExampleFault("control_token", detail)
                found = list(itertools.compress(found, kept))
            ids += found
            offsets += [(start - before, end - within)] * len(found)
        return ids, offsets

    def control_tokens(self, template: str) -> list[str]:
        """The tokens that give a conversation its form, longest first: the special ones, and of the other added ones
        those that the template (jinja source) writes, but for pairs such as <think> and </think>, which people discuss
        and models write."""
        whole = set(self.whole_tokens)

        def is_control(token: str) -> bool:
            opening = token.replace("</", "<", 1)
            paired = {opening, opening.replace("<", "</", 1)} <= whole and opening[:1] == "<"
            return self.is_special(self.token_id(token)) or (token in template and not paired)

        return sorted((t for t in whole if len(t) > 1 and t.strip() and is_control(t)), key=lambda t: (-len(t), t))

    @abc.abstractmethod
    def _encode(self, text: str) -> tuple[list[int], Offsets]: ...

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None: ...

    @abc.abstractmethod
    def token(self, index: int) -> str:
        """The vocabulary's own spelling of an id, for showing."""

    @abc.abstractmethod
    def _model_special_id(self, name: str) -> int | None: ...

    @abc.abstractmethod
    def show(self, index: int) -> str:
        """The text that an id stands for, with its leading space; its own spelling where it is part of a character."""

    @abc.abstractmethod
    def _special_ids(self) -> set[int]: ...

    def is_special(self, index: int) -> bool:
        return int(index) in self._special_ids()

    model_file: str
    vocab_size: int
    whole_tokens: tuple[str, ...]  # found in a text as a whole: special, user-defined and added ones


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by the library `tokenizers`."""

    model_file = "tokenizer.json"

    def __init__(self, content: bytes, settings: _Settings):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{settings.name}: not a tokenizer.json ({error})") from None
        # A saved tokenizer.json may hold the truncation and padding of somebody's last call.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        extra = [*settings.special.values(), *settings.extra]
        self._tokenizer.add_special_tokens([token for token in extra if self.token_id(token) is not None])
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {index for index, token in added.items() if token.special}
        self.whole_tokens = tuple(token.content for token in added.values())
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[0]
        self._first_added = first if first in self._specials else None
        super().__init__(content, settings, adds_bos=self._first_added is not None)

    def _encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, index: int) -> str:
        return self._tokenizer.id_to_token(int(index)) or f"<{index}>"

    def show(self, index: int) -> str:
        text = self.decode([index], skip_special=False)
        return self.token(index) if "\ufffd" in text or not text else text

    def _model_special_id(self, name: str) -> int | None:
        return self._first_added if name == "bos_token" else None

    def _special_ids(self) -> set[int]:
        return self._specials


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`. Special are its control and user-defined pieces, and tokens added beside it."""

    model_file = "tokenizer.model"

    def __init__(self, content: bytes, settings: _Settings):
        proto = _parse_model(content, settings.name)
        normalizer = proto.normalizer_spec
        self._prefix = normalizer.add_dummy_prefix
        self._keeps_spaces = not normalizer.remove_extra_whitespaces
        self._at_start = _processor(proto)
        normalizer.add_dummy_prefix = False
        self._inside = _processor(proto)
        self._legacy = bool(settings.config.get("legacy", False))

        kinds = proto.SentencePiece
        self._ids = {
            piece.piece: index
            for index, piece in enumerate(proto.pieces)
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)
        }
        self._specials = {i for i, piece in enumerate(proto.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
        strip = self._add_tokens(settings)
        self._texts = {index: text for text, index in self._ids.items()}
        self.whole_tokens = tuple(self._ids)
        self.vocab_size = max(len(proto.pieces), *(index + 1 for index in self._texts))
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("|".join(_pattern(text, strip.get(text, {})) for text in longest_first))
        super().__init__(content, settings, adds_bos=True)

    def _add_tokens(self, settings: _Settings) -> dict[str, dict]:
        """Takes in tokens declared beside the model; returns those whose neighbouring white space they swallow."""
        self._ids |= {text: int(index) for text, index in settings.added.items()}
        self._specials |= {int(index) for index in settings.added.values()}
        strip = {}
        for index, token in settings.config.get("added_tokens_decoder", {}).items():
            self._ids[token["content"]] = int(index)
            strip[token["content"]] = token
            if token.get("special"):
                self._specials.add(int(index))
        for text in (*settings.special.values(), *settings.extra):
            index = self.token_id(text)
            if index is not None:
                self._ids[text] = index
                self._specials.add(index)
        return strip

    def _encode(self, text: str) -> tuple[list[int], Offsets]:
        ids, offsets, done = [], [], 0
        for match in self._split.finditer(text):
            self._encode_piece(text, done, match.start(), ids, offsets)
            token = match.group()
            ids.append(self._ids[token if token in self._ids else token.strip()])
            offsets.append(match.span())
            done = match.end()
        self._encode_piece(text, done, len(text), ids, offsets)
        return ids, offsets

    def _encode_piece(self, text: str, start: int, end: int, ids: list[int], offsets: Offsets) -> None:
        """Text between special tokens, appended to ids and offsets."""
        if start == end:
            return
        piece = text[start:end]
        prefixed = (start == 0 or self._legacy) and not (self._keeps_spaces and piece[0] in " \u2581")
        processor = self._at_start if prefixed else self._inside
        found = processor.encode(piece, return_type="offset_mapping")
        ids += found["ids"]
        spans = [(start + begin, start + stop) for begin, stop in found["offsets"]]
        # Of the bytes of one character all but the last have an empty span; so has a lone dummy space.
        empty = [place for place, (begin, stop) in enumerate(spans[:-1]) if begin == stop]
        for place in reversed(empty):
            spans[place] = (spans[place][0], spans[place + 1][1])
        offsets += spans

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        texts, run = [], []
        for index in map(int, ids):
            if index not in self._texts:
                run += [index] * (index < len(self._inside))  # a model's vocabulary may be padded beyond the pieces
                continue
            texts += [self._inside.decode(run)] if run else []
            run = []
            if not (skip_special and index in self._specials):
                texts.append(self._texts[index])
        texts += [self._inside.decode(run)] if run else []
        text = "".join(texts)
        return text[1:] if self._prefix and text.startswith(" ") else text

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        index = self._inside.piece_to_id(token)
        return index if self._inside.id_to_piece(index) == token else None

    def token(self, index: int) -> str:
        index = int(index)
        if index in self._texts:
            return self._texts[index]
        return self._inside.id_to_piece(index) if index < len(self._inside) else f"<{index}>"

    def show(self, index: int) -> str:
        token = self.token(index)
        return "\n" if token == "<0x0A>" else token.replace("\u2581", " ")

    def _model_special_id(self, name: str) -> int | None:
        found = {"bos_token": self._inside.bos_id, "eos_token": self._inside.eos_id, "pad_token": self._inside.pad_id}
        index = found[name]()
        return None if index < 0 else index

    def _special_ids(self) -> set[int]:
        return self._specials


def _parse_model(content: bytes, name: str):
    # Imported here: it needs protobuf, which only models of sentencepiece call for.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    except DecodeError:
        raise DataError(f"{name}: neither a sentencepiece model nor a tokenizer.json") from None
    if not proto.pieces:
        raise DataError(f"{name}: a sentencepiece model without pieces")
    return proto


def _processor(proto) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _pattern(text: str, token: dict) -> str:
    return (r"\s*" if token.get("lstrip") else "") + re.escape(text) + (r"\s*" if token.get("rstrip") else "")
