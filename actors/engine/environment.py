"""What must be settled before vllm is imported: it reads its variables, and the modules it finds, while it loads.

Called once by the engine, in the generator's own process.
"""

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
    # The launcher says how many threads there are; bound to cores they would fight the learner's.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One compiled helper (ranks of sampled tokens, which nobody reads) would cost a C++ compiler and seconds at the first step.
    "TORCH_COMPILE_DISABLE": "1",
}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE"}

_UNUSED = ("sklearn",)
"""Optional packages transformers imports where it finds them, for features no engine uses: seconds of start-up."""

_is_settled = False


def settle(generators: Generators) -> None:
    """Set vLLM's environment for this configuration; once per process, best before transformers is imported.

    Raises RuntimeError when vllm is already imported.
    """
    global _is_settled
    if _is_settled:
        return
    if "vllm" in sys.modules:
        raise RuntimeError("vllm was imported before its environment was set; only actors/engine may import it")
    os.environ.update(_ALWAYS)
    if not generators.gpus:
        os.environ.update(_ON_CPU)
        os.environ["OMP_NUM_THREADS"] = str(generators.threads)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "transformers" not in sys.modules:
        # It remembers what it has found: hidden later, a package would be imported all the same, and fail.
        for package in _UNUSED:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    define_missing_schemas()
    _is_settled = True
