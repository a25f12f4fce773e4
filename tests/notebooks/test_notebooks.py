"""The notebooks: their form, and each one executed as a user would, with settings of the embedded world."""

import ast
import math
import os
import pathlib
import re
import subprocess
import sys

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
    "plan": {  # counted, not compiled: what the tests install has no compiler of TPUs
        "MODEL": "shape:qwen2.5-0.5b",
        "TOPOLOGIES": ("h100:1", "h100:8"),
        "TOKENS_PER_ROW": 1024,
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
    """The notebook with its outputs, run in `folder` by a kernel of this interpreter on one CPU device.

    Programs are compiled without most optimizations: most of the time of so few steps is the compiler's.
    """
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read(path)
    cell = parameters(notebook)
    assert settings.keys() <= assigned(cell.source)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder / "ipython")}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment.pop("XLA_FLAGS", None)  # the eight devices of the tests
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_calls_pip_where_jaxpost_is_not(path, tmp_path):
    """Run by IPython in a process of its own, with a `%pip` that prints what it is asked for."""
    pytest.importorskip("IPython")
    cell = read(path).cells[0].source.replace('find_spec("jaxpost")', 'find_spec("not_there")')
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S; s = S.instance(); "
        f"s.register_magic_function(print, magic_name='pip'); s.run_cell({cell!r}).raise_error()"
    )
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r'install -q "jaxpost\[tpu,hf,plot\] @ git\+https://\S+"\n', out.stdout), out.stdout


def executed(name: str, folder: pathlib.Path):
    """(all that a notebook wrote, how many pictures) with the settings of the embedded world."""
    notebook = execute(REPOSITORY / "docs" / "notebooks" / f"{name}.ipynb", folder, EMBEDDED[name])
    return printed(notebook), pictures(notebook)


@pytest.mark.slow
def test_sft_and_dpo(tmp_path):
    """The base answers neither question, the SFT model both, though no dialogue asks them; DPO begins at ln 2."""
    text, drawn = executed("sft_dpo", tmp_path)
    said = {name: re.findall(rf"^  {name} +(.*)$", text, flags=re.M) for name in ("base", "SFT", "DPO")}
    assert drawn == 2 and all(len(answers) == 2 for answers in said.values())
    for capital, base, sft in zip(("Kathmandu", "Budapest"), said["base"], said["SFT"], strict=True):
        assert capital in sft and capital not in base
    assert float(re.search(r"first loss (\S+)", text)[1]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(re.search(r"held-out pairs ranked right: ([\d.]+)%", text)[1]) > 80


@pytest.mark.slow
def test_reward_and_ppo(tmp_path):
    """The good answer scores higher, PPO begins where it drew, and the reward on held-out prompts rises."""
    text, drawn = executed("reward_ppo", tmp_path)
    assert drawn == 2 and "not halted" in text
    assert float(re.search(r"first loss (\S+)", text)[1]) == pytest.approx(math.log(2), abs=1e-5)
    good, bad = (EMBEDDED["reward_ppo"][name] for name in ("GOOD", "BAD"))
    scores = {answer: float(score) for score, answer in re.findall(r"^([+-]\d\S*)  (.+)$", text, flags=re.M)}
    assert scores[good] > scores[bad]
    assert float(re.search(r"first/ratio_error +(\S+)", text)[1]) < 1e-5
    before, after = re.search(r"held-out prompts: (\S+) -> (\S+),", text).groups()
    assert float(after) > float(before)


@pytest.mark.slow
def test_own_loss(tmp_path):
    """The loss of the notebook passes its own check, trains beside DPO, and a misspelt argument is named."""
    text, drawn = executed("own_loss", tmp_path)
    assert drawn == 1
    shares = [float(share) for share in re.findall(r"held out: ([\d.]+)% ranked right", text)]
    assert len(shares) == 2 and min(shares) > 70
    assert "loss.penality: __main__:positive takes beta, penalty" in text


@pytest.mark.slow
def test_plan(tmp_path):
    """More devices hold less each, less is kept where more is computed again, and one that fits is named."""
    text, drawn = executed("plan", tmp_path)
    peaks = {
        (name, remat): float(peak) for name, remat, peak in re.findall(r"^(h100:\d) +(\w+) +([\d.]+) ", text, re.M)
    }
    assert drawn == 1 and len(peaks) == 4
    assert peaks["h100:8", "full"] < peaks["h100:1", "full"] < peaks["h100:1", "none"]
    assert "h100:1 with remat.policy=none: 1 devices" in text


def test_every_notebook_is_executed():
    assert {path.stem for path in NOTEBOOKS} == EMBEDDED.keys()
