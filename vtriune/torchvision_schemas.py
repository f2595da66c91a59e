"""Make transformers' image processors importable where torchvision, torchaudio and torchcodec lack compiled operators.

The CPU build of torch meets wheels of those three whose compiled halves need CUDA libraries. torchvision then fails to import
because two operator schemas are missing; torchaudio and torchcodec raise OSError, where their users expect a missing package.
Callers: anything of ours that imports transformers' processors, and every vLLM process through the entry point group
`vllm.general_plugins`.
"""

import importlib
import importlib.util
import pathlib
import sys

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A torch.library.Library undoes its definitions when it is collected: it lives as long as the process.
_definitions: list[torch.library.Library] = []


def define_missing_schemas() -> None:
    """Define `torchvision::nms` and `torchvision::qnms` where they are missing, and hide audio packages that cannot load.

    Idempotent, and a no-op where the compiled operators are present. Call before `import transformers`' processors.
    """
    if "torchvision" not in sys.modules and not _definitions and not _compiled_operators_load():
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(name + _SIGNATURE)  # type: ignore[no-untyped-call]
        _definitions.append(library)
    for package in ("torchaudio", "torchcodec"):
        _hide_unloadable(package)


def _compiled_operators_load() -> bool:
    """Whether torchvision's own library loads (which registers its operators); True where torchvision is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    for path in pathlib.Path(next(iter(spec.submodule_search_locations))).glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError:
            return False
        return True
    return False


def _hide_unloadable(package: str) -> None:
    """Make `find_spec(package)` answer None when the package is installed and its compiled library cannot be loaded."""
    if package in sys.modules or importlib.util.find_spec(package) is None:
        return
    try:
        importlib.import_module(package)
    except (OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]
        # If transformers was imported before, it holds cached answers to "is this package available?".
        checks = sys.modules.get("transformers.utils.import_utils")
        for answer in vars(checks).values() if checks else ():
            if hasattr(answer, "cache_clear"):
                answer.cache_clear()
