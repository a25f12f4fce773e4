"""What a run was made from: RUN_DIR/inputs.json holds sha256 hashes of config, model, tokenizer, template and data."""

import dataclasses
import functools
import hashlib
import json

from etils import epath

from jaxpost import config as configs
from jaxpost.errors import DataError
from jaxpost.models import hf
from jaxpost.models.adapter import Adapter
from jaxpost.train.folder import MAY_DIFFER, model_folder, write_atomically
from jaxpost.train.setup import Model, open_model

NAME = "inputs.json"


def describe(config, model, data) -> dict[str, str]:
    """{input: sha256}: the config less what may differ when a run goes on, tokenizer, template, and every file."""
    kept = {name: value for name, value in configs.flatten(config).items() if name not in MAY_DIFFER}
    found = {
        "config": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        "tokenizer": model.tokenizer.fingerprint,
        "template": model.template.fingerprint,
    }
    models = {"model": model}
    for name in ("reference", "teacher"):
        if (path := getattr(config, name).path) is not None:
            folder = model_folder(path)
            adapters = dataclasses.replace(model, adapter=folder) if hf.is_adapter(folder) else None
            models[name] = adapters or open_model(config, mesh=None, path=path)
    for name, opened in models.items():
        found |= {f"{name}: {opened.path / file}": digest for file, digest in model_files(opened).items()}
    if config.teacher.outputs is not None:
        manifest = epath.Path(config.teacher.outputs) / "teacher.json"
        found[f"teacher: {manifest}"] = _sha256(manifest, *_stamp(manifest))
    return found | {f"data: {path}": digest for path, digest in data.files.items()}


def record(folder: epath.Path, found: dict[str, str]) -> None:
    """Writes inputs.json; where a run goes on, it must be of the same inputs. Raises DataError."""
    check(folder, found)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NAME, json.dumps(found, indent=2) + "\n")


def check(folder: epath.Path, found: dict[str, str]) -> None:
    """Raises DataError where the run in `folder` was made from other inputs than these; not where it says nothing."""
    path = folder / NAME
    if not path.exists():
        return
    before = json.loads(path.read_text())
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    if changed:
        raise DataError(f"{path}: changed since the run began: {', '.join(changed)}; put back what it was made from")


def model_files(model: Model) -> dict[str, str]:
    """{name: sha256} of the config and weights of a model and its adapters, or of the parameters of somebody else's."""
    if isinstance(model.policy, Adapter):
        return {"parameters": model.policy.fingerprint()}
    folder, adapter = model.path, model.adapter
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"), key=lambda path: path.name)]
    found = {path.name: _sha256(path, *_stamp(path)) for path in paths}
    adapters = () if adapter is None else (adapter / hf.ADAPTER_CONFIG, adapter / hf.ADAPTER_WEIGHTS)
    return found | {f"adapter {path.name}": _sha256(path, *_stamp(path)) for path in adapters}


def _stamp(path: epath.Path) -> tuple[int, float]:
    found = path.stat()
    return found.length, found.mtime


@functools.lru_cache(maxsize=256)
def _sha256(path: epath.Path, length: int, mtime: float) -> str:
    """Of the content, read once in a process as long as the file stays as it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
