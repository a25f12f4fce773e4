"""The notebooks: their form, and each one executed as a user would, with settings of the embedded world."""

import ast
import os
import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
REPOSITORY = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
SMALL_ROWS = {"ROWS_PER_STEP": 4, "TOKENS_PER_ROW": 256, "REMAT": "none"}
# What takes the place of each notebook's own settings, in the cell that is tagged `parameters`.
EMBEDDED = {
    "sft_dpo": {
        **SMALL_ROWS,
        "MODEL": "embedded:base",
        "TEMPLATE": None,
        "CONVERSATIONS": "embedded:instructions",
        "PAIRS": "embedded:preferences_eval",
        "EVAL_EXAMPLES": 40,
        "QUESTIONS": ("What is the capital of Nepal?", "What is the capital of Hungary?"),  # asked by no dialogue
        "NEW_TOKENS": 32,
        "ACCUMULATE": 2,
        "SFT_STEPS": 40,
        "SFT_LEARNING_RATE": 1e-3,
        "DPO_STEPS": 16,
        "DPO_LEARNING_RATE": 1e-4,
        "BETA": 1.0,
    },
    "reward_ppo": {
        **SMALL_ROWS,
        "MODEL": "embedded:sft",
        "PAIRS": "embedded:comparisons_eval",
        "PROMPTS": "embedded:questions",
        "GOLD": "jaxpost.embedded.dialogues:gold",
        "QUESTION": "What is the capital of France?",
        "GOOD": "The capital of France is Paris. You are welcome!",
        "BAD": "The capital of France is Rome.",
        "LORA_RANK": None,
        "REWARD_STEPS": 30,
        "REWARD_LEARNING_RATE": 1e-3,
        "PPO_STEPS": 3,
        "PPO_LEARNING_RATE": 2e-4,
        "PROMPTS_PER_STEP": 16,
        "PROMPT_TOKENS": 64,
        "NEW_TOKENS": 32,
        "EVAL_EXAMPLES": 50,
    },
    "own_loss": {
        "PAIRS": "embedded:preferences_eval",
        "EVAL_EXAMPLES": 40,
        "STEPS": 8,
        "ROWS_PER_STEP": 4,
        "TOKENS_PER_ROW": 256,
    },
}


def read(path: pathlib.Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook):
    """The one cell that is tagged `parameters`."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def assigned(source: str) -> set[str]:
    """The names that a cell of assignments gives values to."""
    names = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def execute(path: pathlib.Path, folder: pathlib.Path, settings: dict):
    """The notebook with its outputs, run in `folder` by a kernel of this interpreter on one CPU device."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read(path)
    cell = parameters(notebook)
    assert settings.keys() <= assigned(cell.source)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder / "ipython")}
    environment.pop("XLA_FLAGS", None)  # the eight devices of the tests
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.kernel_name = "python3"
    return client.execute(env=environment)


def printed(notebook) -> str:
    """All that the cells wrote to their standard output."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def pictures(notebook) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """The first cell installs, one cell holds the settings, every cell compiles, and nothing is left of a run."""
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    notebook = read(path)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "code" and "%pip install" in first.source and "git+" in first.source
    assert EMBEDDED[path.stem].keys() <= assigned(parameters(notebook).source)
    for cell in code_cells(notebook):
        compile(transform(cell.source), path.name, "exec")
        assert not cell.outputs and cell.execution_count is None
