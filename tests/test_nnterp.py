"""The nnterp snippet of docs/using.md, beside an nnsight of its own: nnterp 1.3 does not import beside nnsight 0.8."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the two need that the tests' environment does not have, as pip resolved it.
PACKAGES = ["nnterp==1.3.0", "nnsight==0.7.0", "astor==0.8.1", "toml", "python-socketio==5.18.1"]
PACKAGES += ["python-engineio==4.15.1", "bidict==0.24.1", "simple-websocket==1.1.0", "wsproto", "h11"]

EDITED = """
import torch
twin, ids = unnorm.load("gpt2-norm-free"), model.tokenizer("import os, sys", return_tensors="pt").input_ids
with torch.no_grad():
    assert (twin(ids).logits - logits).abs().max() < 1e-5
    with model.trace("import os, sys"):
        model.layers_output[1] = torch.zeros_like(residual)
        edited = model.logits.save()
    hook = twin.transformer.h[1].register_forward_hook(lambda *_: torch.zeros_like(residual))
    expected = twin(ids).logits
    assert (edited - expected).abs().max() < 1e-5 and (edited - logits).abs().max() > 1e-3
    hook.remove()
    with model.generate("import os, sys", max_new_tokens=3):
        out = model.generator.output.save()
    assert out.tolist() == twin.generate(ids, max_new_tokens=3, do_sample=False).tolist()
print("agreed")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("nnterp")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PACKAGES]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("nnterp and the nnsight that it needs can't be installed here")
    return target


def test_snippet_loads_edits_and_generates(packages: Path, finished_run: Path, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```py\n(import unnorm  #.*?)```", (ROOT / "docs" / "using.md").read_text(), re.S)
    (tmp_path / "gpt2-norm-free").symlink_to(finished_run)
    done = subprocess.run(
        [sys.executable, "-c", f"{snippet}{EDITED}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT / "src")])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout
