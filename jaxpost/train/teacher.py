"""Teachers: another checkpoint in `frozen`, or a folder of what it said, written by `jaxpost teach`.

Such a folder holds, for `train` and for `eval` if there is one, two `ValueStore`s: PART.ids (int32) and PART.logps
(f32), the k likeliest tokens at every trained token and their log-probabilities: 8 k bytes a token. Its teacher.json
says of which teacher and data they are.
"""

import dataclasses
import functools
import hashlib
import json

import jax
from etils import epath

from jaxpost.data.tokenizers import first_difference, load_tokenizer
from jaxpost.data.values import ValueStore, attach
from jaxpost.errors import ConfigError, DataError
from jaxpost.train.distill import IDS, LOGPS, Teacher, likeliest, live_teacher, stored_teacher
from jaxpost.train.folder import write_atomically
from jaxpost.train.inputs import model_files
from jaxpost.train.per_token import fill
from jaxpost.train.setup import Data, Model, open_model, reference_weights

MANIFEST = "teacher.json"
FORMAT = "jaxpost teacher outputs 1"
FILES = {IDS: ("ids", "i4"), LOGPS: ("logps", "f4")}


def attach_teacher(config, model: Model, mesh, data: Data) -> tuple[Data, Teacher]:
    """(the data, whose documents carry what a stored teacher said; the teacher)."""
    settings = config.teacher
    options = {"temperature": settings.temperature, "top_k": settings.top_k}
    if settings.outputs is not None and planned.current():
        k = settings.top_k or 1
        data = with_placeholders(data, IDS, shape=(k,), dtype=np.int32)
        return with_placeholders(data, LOGPS, shape=(k,)), stored_teacher(model.policy.config.vocab_size, **options)
    if settings.outputs is not None:
        manifest = read_manifest(config, data)
        return with_outputs(config, data, manifest), stored_teacher(manifest["vocab_size"], **options)
    teacher = open_teacher(config, model, mesh)
    shared_vocabulary(config, model, teacher)
    return data, live_teacher(teacher.policy, teacher.load(), **options)


def open_teacher(config, model: Model, mesh) -> Model:
    """`teacher.path`, held in the type it computes in. Raises ConfigError where its tokens are not those of `model`."""
    teacher = open_model(config, mesh, path=config.teacher.path)
    if planned.current():
        return reference_weights(config, teacher)
    tokenizer = load_tokenizer(teacher.path)
    index = first_difference(model.tokenizer, tokenizer)
    if index is not None:
        theirs, ours = tokenizer.token(index), model.tokenizer.token(index)
        raise ConfigError(f"teacher.path: token {index} is {theirs!r}, but {ours!r} in model.path; both need the same")
    if model.tokenizer.vocab_size > min(tokenizer.vocab_size, teacher.policy.config.vocab_size):
        raise ConfigError(
            f"teacher.path: has {tokenizer.vocab_size} tokens, but model.path {model.tokenizer.vocab_size}; "
            "a teacher must know all words of its student"
        )
    return teacher if mesh is None else reference_weights(config, teacher)


def shared_vocabulary(config, model: Model, teacher: Model) -> int:
    """Tokens that both score: tables may be padded to different sizes. ConfigError where teacher.top_k is more."""
    shared = min(model.policy.config.vocab_size, teacher.policy.config.vocab_size)
    if config.teacher.top_k is not None and config.teacher.top_k > shared:
        raise ConfigError(f"teacher.top_k: {config.teacher.top_k}, but the vocabulary has {shared} tokens")
    return shared


# ---- written ----


def write_outputs(folder: epath.Path, config, model: Model, mesh, data: Data, chunk: int) -> None:
    """What `teacher.path` says of all documents: its `teacher.top_k` likeliest tokens at `teacher.temperature`."""
    settings, teacher = config.teacher, open_teacher(config, model, mesh)
    manifest = {
        "format": FORMAT,
        "teacher": model_files(teacher),
        "compute": teacher.policy.compute_dtype,
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "vocab_size": shared_vocabulary(config, model, teacher),
        "data": data.identity,
    }
    options = {"temperature": settings.temperature, "top_k": settings.top_k, "vocab_size": manifest["vocab_size"]}
    outputs = jax.jit(lambda params, batch: likeliest(teacher.policy, params, batch, **options, chunk=chunk))
    ask = functools.partial(outputs, teacher.load())
    for part, documents in parts(data).items():
        stores = {name: ValueStore.for_documents(documents, settings.top_k, type) for name, (_, type) in FILES.items()}
        fill([stores[IDS], stores[LOGPS]], documents, ask, config, mesh, data.branches, f"teacher's outputs, {part}")
        for name, store in stores.items():
            store.save(folder / f"{part}.{FILES[name][0]}", _digest(manifest))
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def parts(data: Data) -> dict:
    """{"train": documents, "eval": documents} of those that there are."""
    return {name: found for name, found in (("train", data.train), ("eval", data.eval)) if found is not None}


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ---- read ----


def read_manifest(config, data: Data) -> dict:
    """teacher.json of `teacher.outputs`. Raises DataError, ConfigError where it is of something else than this run."""
    path = epath.Path(config.teacher.outputs) / MANIFEST
    if not path.exists():
        raise DataError(f"teacher.outputs: no {path}; `jaxpost teach` writes such a folder")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: of the format {manifest.get('format')!r}, expected {FORMAT!r}; make it anew")
    settings, stored = config.teacher, manifest["data"]
    changed = [name for name in {**stored, **data.identity} if stored.get(name) != data.identity.get(name)]
    if changed:
        raise DataError(f"{path}: made for other data than this run's ({', '.join(changed)} differ)")
    if settings.temperature != manifest["temperature"]:
        raise ConfigError(
            f"teacher.temperature: {settings.temperature}, but {path} was made at {manifest['temperature']}"
        )
    if settings.top_k is not None and settings.top_k > manifest["top_k"]:
        raise ConfigError(f"teacher.top_k: {settings.top_k}, but {path} holds {manifest['top_k']} tokens")
    if settings.path is not None:
        teacher = model_files(open_model(config, mesh=None, path=settings.path))
        if teacher != manifest["teacher"]:
            raise ConfigError(f"teacher.path: not the teacher of {path}; set None, or the one that it was made from")
    return manifest


def with_outputs(config, data: Data, manifest: dict) -> Data:
    """`data` whose documents carry `token["teacher_ids"]` and `token["teacher_logps"]`. Raises DataError."""
    found, folder = {}, epath.Path(config.teacher.outputs)
    for part, documents in parts(data).items():
        for name, (ending, _) in FILES.items():
            path = folder / f"{part}.{ending}"
            store = ValueStore.open(path, _digest(manifest))
            if store is None:
                raise DataError(f"{path}: missing, cut short or of another teacher.json; run `jaxpost teach` again")
            documents = attach(documents, name, store)
        found[part] = documents
    return dataclasses.replace(data, **found)
