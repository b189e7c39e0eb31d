"""Make transformers know our model types as soon as both packages are imported, in either order, at no cost to either import.

`import llmdistill` must not import transformers. So where transformers' registry of configs is loaded already we enter ours at once, and otherwise an import
hook waits for that one module, enters them when it has loaded, and is gone. The registry is often loaded in the middle of other imports, where importing a
config class of transformers fails in a circle; what is entered is therefore a stand-in, which imports the class when a checkpoint first asks for it. The
first config that is made brings its model class (structured_config.py).
"""

from __future__ import annotations

import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from types import ModuleType

REGISTRY = "transformers.models.auto.configuration_auto"
MODEL_TYPES = ("llmdistill_t5", "llmdistill_llama", "llmdistill_qwen2")


def register() -> None:
    """Enter our model types, now or when transformers' registry is imported."""
    if REGISTRY in sys.modules:
        _enter_stand_ins(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


def _enter_stand_ins(registry: ModuleType) -> None:
    for model_type in MODEL_TYPES:
        registry.CONFIG_MAPPING.register(model_type, _ConfigClass(model_type), exist_ok=True)


class _ConfigClass:
    """Stands in for a config class until it is used for anything; then enters the classes themselves and hands over to its own."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type

    def _load(self) -> Any:
        from transformers.models.auto.configuration_auto import AutoConfig

        from llmdistill.models.structured_config import CONFIGS

        for config_class in CONFIGS:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        return next(config_class for config_class in CONFIGS if config_class.model_type == self._model_type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._load()(*arguments, **settings)


class _AfterRegistry:
    """A finder of sys.meta_path. Finds the registry module as usual, with a loader that goes on to enter ours."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]  # importlib.abc would cost more than all the rest of this
        return spec


class _Loader:
    """The usual loader; afterwards our model types are entered and the hook is removed."""

    def __init__(self, usual: Loader) -> None:
        self.usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.usual
        if module.__spec__ is not None:
            module.__spec__.loader = self.usual
        self.usual.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterRegistry)]
        _enter_stand_ins(module)
