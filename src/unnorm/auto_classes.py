"""Makes transformers' Auto classes find the twins' classes, each when it is first asked for.

`import unnorm` must cost next to nothing, and one twin must not cost the import of every family's classes. So nothing
is imported here: the mapping from `model_type` to class, which the Auto classes consult, is watched for twins' types.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TYPE_PREFIX = "unnorm_"
"""Of the `model_type` of every twin: GPT-2's is `unnorm_gpt2`."""
_MAPPING = "transformers.models.auto.configuration_auto"


def register_on_demand() -> None:
    """Register twins' classes with transformers on demand, whether it is imported already or will be."""
    if _MAPPING in sys.modules:
        _watch(importlib.import_module(_MAPPING))  # Another thread may still be importing it.
    else:
        sys.meta_path.insert(0, _OnceImported())


class _OnceImported(MetaPathFinder):
    """Watches the mapping as soon as transformers has made it."""

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MAPPING or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            _watch(module)
            sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


def _watch(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Registered(mapping._extra_content)


class _Registered(dict[str, Any]):
    """Classes registered with transformers, by `model_type`; a twin's is made when it is looked up."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and isinstance(key, str) and key.startswith(TYPE_PREFIX):
            _register(key)
        return super().__contains__(key)


def _register(model_type: str) -> None:
    """Register the twin's class of a `model_type`; one that transformers has no causal language model for is left."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    stock = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type.removeprefix(TYPE_PREFIX))
    if isinstance(stock, str):
        transformers, modeling = importlib.import_module("transformers"), importlib.import_module("unnorm.modeling")
        modeling.ln_free_class(getattr(transformers, stock))
