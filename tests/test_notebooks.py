"""Every notebook runs from a fresh kernel, offline, and is committed without outputs."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None), f"clear the outputs of: {cell.source[:60]}"


def test_uses_the_public_interface_only(notebook):
    code = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(r"import _|\._(?!_)|sys\.path|[%!]pip", code)


def test_shows_how_to_take_another_encoder(notebook):
    assert any("dinov2_vits14" in cell.source for cell in notebook.cells)


@pytest.mark.timeout(600)
def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    told = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    # tqdm's one warning where ipywidgets, which no experiment needs, is not installed
    assert not re.sub(r".*TqdmWarning: IProgress not found.*\n.*\n", "", told), "a notebook must not warn"
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).std() > 10
    assert not list(tmp_path.glob("*.*")), "a notebook must not leave files"
