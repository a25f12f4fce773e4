"""Imports run downward only: the table of rooms in docs/architecture.md, as a test."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGE = REPOSITORY / "jaxpost"

# From the top down; a room imports rooms of lower layers, itself, and the base.
LAYERS = [
    {"main", "__main__", "cli", "api"},
    {"pipeline", "report", "plan"},
    {"stages"},
    {"train", "evaluation", "feedback"},
    {"sampling", "tasks", "data"},
    {"models", "rl", "losses"},
    {"sharding", "ops"},
    {"types"},
]
BASE = {
    "errors",
    "schema",
    "keys",
    "config",
    "__init__",
}  # import nothing of ours but each other; anyone may import them
# Within a layer only these look sideways.
SIDEWAYS = {("main", "cli"), ("__main__", "cli"), ("cli", "api"), ("sampling", "data"), ("tasks", "data")}
# The little world that ships: data and rules for everyone; its scripts, which no room imports, use the api.
EMBEDDED_SCRIPTS = {"embedded.make"}
PURE = {"losses", "rl", "ops"}  # import nothing of ours but each other, types and errors
HOST_ONLY = {"data", "tasks"}  # numpy on the host: no jax in their sources


def modules() -> dict[str, pathlib.Path]:
    """{"train.step": path, ...} of every source file, without the leading jaxpost."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: pathlib.Path) -> set[str]:
    """Those of ours, without the leading jaxpost, cut to module names."""
    known = modules()
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxpost":
            while parts[1:] and ".".join(parts[1:]) not in known:
                parts.pop()
            found.add(".".join(parts[1:]) or "__init__")
    return found


def violations(known: dict[str, pathlib.Path]) -> list[str]:
    """`A imports B` for every import that does not run downward."""
    edges = [(module, other) for module, path in known.items() for other in sorted(own_imports(path))]
    return [f"{module} imports {other}" for module, other in edges if not allowed(module, other)]


def allowed(module: str, other: str) -> bool:
    """Whether `module` may import `other`, by the table of rooms."""
    depth = {room: n for n, layer in enumerate(LAYERS) for room in layer}
    room, target = module.partition(".")[0], other.partition(".")[0]
    if module == "__init__":
        return other == "api"  # lazy, in __getattr__
    if room in PURE:
        return target in PURE | {"types", "errors"}
    if target in BASE:
        return True
    if module in EMBEDDED_SCRIPTS:
        return True
    if room == "stages" == target:  # stages never import each other; the package lists them
        return module == "stages" or other == module
    if room == target or (room, target) in SIDEWAYS:
        return other not in EMBEDDED_SCRIPTS
    if room == "embedded":
        return target in ("data", "types")
    if target == "embedded":
        return other not in EMBEDDED_SCRIPTS and depth[room] <= depth["train"]
    return room in depth and depth[room] < depth[target]


def test_every_room_has_a_layer():
    rooms = {module.partition(".")[0] for module in modules()}
    assert rooms <= set().union(*LAYERS, BASE, {"embedded"})


def test_imports_run_downward_only():
    assert violations(modules()) == []


@pytest.mark.parametrize(
    "module, line, refused",
    [
        ("losses.x", "import jaxpost.models", True),
        ("losses.x", "from jaxpost import config", True),
        ("losses.x", "from jaxpost.ops.logprobs import token_logps", False),
        ("config", "import jaxpost.types", True),
        ("train.x", "from jaxpost.embedded import make", True),
        ("ops.x", "from jaxpost.sharding import rules", True),
        ("models.x", "from jaxpost.data import rows", True),
        ("models.x", "from jaxpost.ops import rope", False),
        ("stages.x", "from jaxpost.stages import sft", True),
        ("stages.x", "from jaxpost.stages.sft import run", True),
        ("train.x", "def f():\n    from jaxpost.stages import sft", True),
        ("data.x", "from jaxpost.types import Rows", False),
        ("api.x", "from jaxpost import stages", False),
    ],
)
def test_an_import_upward_is_found(tmp_path, module, line, refused):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert bool(violations({module: path})) == refused


def test_host_rooms_do_not_import_jax():
    for module, path in modules().items():
        if module.partition(".")[0] in HOST_ONLY:
            assert not [name for name in imports(path) if name.partition(".")[0] in ("jax", "jaxlib", "flax")], module


def test_only_the_command_line_reads_flags():
    for module, path in modules().items():
        if module.partition(".")[0] not in ("main", "__main__", "cli", "embedded"):
            used = {name.partition(".")[0] for name in imports(path)} & {"argparse", "absl"}
            assert not used and "sys.argv" not in path.read_text(), module


def test_stages_are_short_and_files_readable():
    for module, path in modules().items():
        lines = path.read_text().count("\n")
        most = 80 if module == "main" else 150 if module.startswith("stages.") else 500
        assert lines <= most, f"{module}: {lines} lines"


def test_the_losses_need_jax_alone():
    """In a fresh process whose path holds no other package, `import jaxpost.losses` works and loads nothing else."""
    code = (
        "import json, sys, jax, jax.numpy, jax.scipy.special; before = set(sys.modules); import jaxpost.losses; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in json.loads(out.stdout)}
    assert loaded - set(sys.stdlib_module_names) <= {"jaxpost", "jax", "jaxlib", "numpy"}
    ours = {name.split(".")[1] for name in json.loads(out.stdout) if name.startswith("jaxpost.")}
    assert ours <= PURE | {"types", "errors"}
