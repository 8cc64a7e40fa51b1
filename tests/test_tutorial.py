"""The tutorial runs from top to bottom, and the outputs that readers see are what it gives."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
MOST_BYTES = 1_000_000


def printed(notebook: Any) -> str:
    """All that the cells wrote as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def errors_of_heads(notebook: Any) -> list[list[str]]:
    """The words of each line of the table of attribution errors."""
    cell = next(cell for cell in notebook.cells if "frozen_scale_error" in cell.source)
    lines = (line for output in cell.outputs for line in output.get("data", {}).get("text/plain", "").splitlines())
    return [line.split() for line in lines if line.strip()]


def test_tutorial_runs_and_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written anew, with its outputs, with UNNORM_WRITE_DOCS=1."""
    client = pytest.importorskip("nbclient")
    if find_spec("transformer_lens") is None:
        pytest.skip("TransformerLens is not installed")
    # Else a notebook's progress bars would be widgets, which no reader of the file sees.
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Two threads beside another test take five times as long as one.
    notebook = nbformat.read(TUTORIAL, as_version=4)
    stored, stored_errors = printed(notebook), errors_of_heads(notebook)
    client.NotebookClient(notebook, timeout=600, startup_timeout=300, kernel_name="python3").execute()
    text = printed(notebook)
    assert "7 norm sites, 0 norms left, proof passed: True" in text
    total, logit = (float(line.split()[-1]) for line in text.splitlines() if line.startswith(("sum of", "the logit")))
    assert total == pytest.approx(logit, abs=2e-5)
    errors = errors_of_heads(notebook)
    assert {value for row in errors if row[0] == "twin" for value in row[1:]} == {"0.0%"}
    images = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 1
    if os.environ.get("UNNORM_WRITE_DOCS"):
        for cell in notebook.cells:
            cell.get("metadata", {}).pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, TUTORIAL)
        return
    # The original's are no matter of training.
    assert [row for row in errors if row[0] == "original"] == [row for row in stored_errors if row[0] == "original"]
    assert len(stored.splitlines()) == len(text.splitlines()) and "7 norm sites, 0 norms left" in stored


def test_tutorial_is_small_and_says_nothing_of_the_machine_it_ran_on() -> None:
    assert TUTORIAL.stat().st_size < MOST_BYTES
    notebook = nbformat.read(TUTORIAL, as_version=4)
    assert all(output.output_type != "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert not any(output.get("name") == "stderr" for cell in notebook.cells for output in cell.get("outputs", []))
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert "/tmp/" not in TUTORIAL.read_text() and "/home/" not in TUTORIAL.read_text()
