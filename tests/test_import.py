"""Importing unnorm costs little, and needs nothing that is optional."""

import subprocess
import sys

OPTIONAL = ("transformer_lens", "nnsight", "nnterp", "gguf", "matplotlib", "selenium", "nbclient", "IPython")


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_fast_and_leaves_torch_for_later() -> None:
    code = (
        "import sys, time; start = time.process_time(); import unnorm, unnorm.cli; print(time.process_time() - start)"
    )
    heavy = "print(*({'torch', 'transformers', 'datasets', 'plotly'} & set(sys.modules)))"
    seconds, *loaded = run(f"{code}; {heavy}")
    assert float(seconds) < 3 and loaded == []


def test_every_verb_is_there_without_what_is_optional() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import unnorm"
    every = "set(unnorm.__all__) - {'__version__'}"
    assert run(f"{code}; print(all(callable(getattr(unnorm, name)) for name in {every}))") == ["True"]
