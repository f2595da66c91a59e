"""How a parent names an actor's class and a child finds it. Used at spawn, and for references to actors of others."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

from vtriune.runtime.actor import Actor


def class_path(cls: type) -> str:
    """How a child names the class: 'module:Qualname', or 'file.py:Qualname' for one defined in the main script.

    Raises TypeError: a class inside a function, which no other process can import.
    """
    if "<locals>" in cls.__qualname__:
        raise TypeError(
            f"{cls.__qualname__} is defined inside a function; actors must be importable: move it to a module"
        )
    module = cls.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        if spec is None and file is None:
            raise TypeError(f"{cls.__qualname__} was typed into an interpreter; actors must stand in a file")
        module = spec.name if spec is not None else str(file)
    return f"{module}:{cls.__qualname__}"


def load_class(path: str) -> type[Actor]:
    """Import an actor class by its path. Raises TypeError: the path names something that is no actor class."""
    module_name, _, qualname = path.rpartition(":")
    module = _load_script(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise TypeError(f"{path} is not an actor class")
    return found


def _load_script(file: str) -> types.ModuleType:
    """The root's main script, imported under a name of its own so that its `if __name__ == "__main__"` does not run."""
    name = "__vtriune_main__"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import actors from {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
