"""Importing unnorm costs little, and needs nothing that is optional."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unnorm

OPTIONAL = ("transformer_lens", "nnsight", "nnterp", "gguf", "matplotlib", "selenium", "nbclient", "IPython")


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_fast_and_leaves_torch_for_later() -> None:
    code = (
        "import sys, time; start = time.process_time(); import unnorm, unnorm.cli; print(time.process_time() - start)"
    )
    heavy = "print(*({'torch', 'transformers', 'datasets', 'plotly'} & set(sys.modules)))"
    seconds, *loaded = run(f"{code}; {heavy}")
    assert float(seconds) < 3 and loaded == []


ORDERS = {
    "before": "import unnorm; from transformers import AutoConfig, AutoModelForCausalLM",
    "after": "from transformers import AutoConfig, AutoModelForCausalLM; import unnorm",
    "between": "import transformers, unnorm; from transformers import AutoConfig, AutoModelForCausalLM",
    "of a family": (
        "import unnorm; from transformers.models.llama.modeling_llama import LlamaForCausalLM; "
        "from transformers import AutoConfig, AutoModelForCausalLM"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_twins_whichever_is_imported_first(order: str, finished_run: Path) -> None:
    others = "[name for name in sys.modules if 'modeling_olmo' in name]"
    code = f"import sys; {ORDERS[order]}; AutoConfig.from_pretrained(sys.argv[1]); "
    code += f"print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__, {others})"
    assert run(code, str(finished_run / "model")) == ["UnnormGPT2LMHeadModel", "[]"]


def test_every_verb_is_there_without_what_is_optional() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({(*OPTIONAL, 'lm_eval')!r})); import unnorm"
    every = "set(unnorm.__all__) - {'__version__'}"
    assert run(f"{code}; print(all(callable(getattr(unnorm, name)) for name in {every}))") == ["True"]


def imported(module: ast.Module) -> Iterator[str]:
    """What a module of ours imports from others of ours when it is imported itself."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("unnorm."):
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "unnorm":
            yield from (f"unnorm.{name.name}" for name in node.names if name.name != "__version__")


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    """So that each can be read, and used, with nothing but those below it."""
    root = Path(unnorm.__file__).parent
    rooms: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        room = path.relative_to(root).with_suffix("").parts[0]
        others = {name.split(".")[1] for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        rooms.setdefault(room, set()).update(others - {room})
    while lowest := [room for room, others in rooms.items() if not others & rooms.keys()]:
        for room in lowest:
            del rooms[room]
    assert not rooms


BY_HAND = sorted(path for room in ("benchmarks", "scripts") for path in Path(__file__).parents[1].glob(f"{room}/*.py"))


@pytest.mark.parametrize("script", BY_HAND, ids=[path.stem for path in BY_HAND])
def test_what_is_run_by_hand_finds_what_it_imports(script: Path) -> None:
    """mypy does not ask whether a module has a name, since transformers' classes are untyped to it."""
    spec = importlib.util.spec_from_file_location(f"by_hand_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
