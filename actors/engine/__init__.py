"""The inference engine of a generator process: vLLM, driven step by step by one thread.

This folder is the only place that imports vllm, and importing it does not: `Engine(…)` sets vLLM's environment first.

    engine            what the generator calls: generate a group, receive a publish, score the canary
    environment       variables and modules settled before vllm is imported
    loop              the stepping thread: requests in, tokens out, commands between steps          (no vllm)
    completions       tokens, log-probs and version spans of a group in flight                      (no vllm)
    expected_tensors  the tensors a publish may and must carry, from the model folder               (no vllm)
    vllm_core         vLLM itself: configuration, requests, one step, caches, weights
    transfer          vLLM's weight-transfer API over our weight group
"""

from actors.engine import environment
from actors.engine.engine import Engine
from actors.engine.loop import EngineBroken, EngineError

__all__ = ["Engine", "EngineBroken", "EngineError", "environment"]
