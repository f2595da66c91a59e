"""What must be settled before vllm is imported: it reads its variables, and the modules it finds, while it loads.

Called once by the engine, in the generator's own process.
"""

import importlib.util
import os
import sys

from vtriune.config.tree import Generators
from vtriune.torchvision_schemas import define_missing_schemas

_ALWAYS = {
    # In this process, stepped by our thread: no second process, no copy of every request and output.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ON_CPU = {
    # Threads are the launcher's affair; bound to cores they would fight the learner's.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One compiled helper (ranks of sampled tokens, which nobody reads) would cost a C++ compiler and seconds at the first step.
    "TORCH_COMPILE_DISABLE": "1",
}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE"}

_UNUSED = ("sklearn",)
"""Optional packages transformers imports where it finds them, for features no engine uses: seconds of start-up."""
_NEED_LIBRARIES = ("torchaudio", "torchcodec")
"""Optional packages whose compiled halves may not load beside a CPU build of torch, and which vLLM imports unguarded."""


def settle(generators: Generators) -> None:
    """Set vLLM's environment for this configuration. Raises RuntimeError when vllm is already imported."""
    if "vllm" in sys.modules:
        raise RuntimeError("vllm was imported before its environment was set; only actors/engine may import it")
    os.environ.update(_ALWAYS)
    if not generators.gpus:
        os.environ.update(_ON_CPU)
        os.environ["OMP_NUM_THREADS"] = str(generators.threads)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for package in _UNUSED:
        _hide(package)
    for package in _NEED_LIBRARIES:
        _hide_unloadable(package)
    define_missing_schemas()


def _hide(package: str) -> None:
    """Make `find_spec(package)` answer None, unless somebody uses the package here already."""
    if package not in sys.modules:
        sys.modules[package] = None  # type: ignore[assignment]


def _hide_unloadable(package: str) -> None:
    if package in sys.modules or importlib.util.find_spec(package) is None:
        return
    try:
        importlib.import_module(package)
    except (OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        _hide(package)
