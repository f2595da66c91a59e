"""vLLM as the loop drives it: requests by id, one step at a time, weights by its weight-transfer API.

Used by the engine: `render` from its preparation thread, everything else from the loop's thread. Completions of a group share
the rendered prompt; their common prefix is computed once (prefix cache), under a salt per version, so that no request ever
reads keys and values of another version's prompt. Log-probs are of the distribution sampled from (`processed_logprobs`):
temperature applied, pads at −inf, in float32.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict
from PIL import Image
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched import output
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.llm_engine import LLMEngine

from actors.engine import transfer
from actors.engine.completions import Sampled
from actors.engine.expected_tensors import Expectation
from vtriune.config.tree import Config
from vtriune.messages import Sampling, WeightManifest
from vtriune.weights.meeting import Meeting, Receipt

_set_num_threads = torch.set_num_threads
"""Kept from before vLLM replaces it by a warning."""

BLOCK_TOKENS = 32
"""Tokens per block of keys and values: the smallest the CPU kernels take, since only whole blocks of a prompt are shared."""


class VllmCore:
    """One in-process engine on this process's device.

    pad_token_ids   sampled with probability 0
    end_token_ids   end a completion and belong to it
    mm_processor_kwargs   of our preprocessor; empty for a model without images
    """

    def __init__(
        self,
        config: Config,
        *,
        pad_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
        mm_processor_kwargs: Mapping[str, Any],
        seed: int,
    ) -> None:
        self._num_threads = 0 if config.cluster.generators.gpus else config.cluster.generators.threads
        self.limit_threads()
        if self._num_threads:
            _keep_pixels()
        _register(config.model.path)
        self._llm = LLMEngine.from_engine_args(_arguments(config, mm_processor_kwargs, seed))
        self._client = self._llm.engine_core
        self._tasks = self._llm.get_supported_tasks()
        self._bias = {token: float("-inf") for token in pad_token_ids} or None
        self._ends = list(end_token_ids)
        self._salt = "v0"
        self._scoring: set[str] = set()
        """Requests that ask for the log-prob of a token of their own."""
        self.max_model_len: int = self._llm.vllm_config.model_config.max_model_len
        # Its image processing calls torch.set_num_threads once per prompt, which vLLM answers by a warning.
        logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)

    def limit_threads(self) -> None:
        """To be called in every thread that uses the model or torch: OpenMP keeps the number of threads per thread, and vLLM's
        CPU kernels fail when the thread that plans a step and the one that runs it disagree."""
        if self._num_threads:
            _set_num_threads(self._num_threads)

    def expectation(self, folder: str) -> Expectation:
        """What a publish to this model must carry."""
        architecture = self._llm.vllm_config.model_config.architectures[0]
        model: Any = ModelRegistry.models[architecture].load_model_cls()
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        name_of = mapper.get_rename_mapper().map_name if mapper is not None else str
        return Expectation(Path(folder), name_of, getattr(model, "packed_modules_mapping", {}))

    def render(self, prompt_ids: Sequence[int], images: Sequence[Image.Image], sampling: Sampling) -> EngineCoreRequest:
        """A group's template: pads expanded to one per image token, pixels processed, parameters fixed.

        Raises ValueError for what vLLM refuses.
        """
        prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_ids)}
        if images:
            prompt["multi_modal_data"] = {"image": list(images)}
        parameters = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=self._ends,
            logit_bias=self._bias,
            logprobs=0,
            detokenize=False,
            skip_clone=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._llm.input_processor.process_inputs("template", prompt, parameters, self._tasks)  # type: ignore[arg-type]

    def scored(self, template: EngineCoreRequest, response: Sequence[int]) -> list[EngineCoreRequest]:
        """A template per token of `response`, to sample one token after the tokens before it: its log-probs are those of
        the response's token, whatever is sampled."""
        templates = []
        for index, token in enumerate(response):
            request: Any = copy.copy(template)
            request.prompt_token_ids = [*(template.prompt_token_ids or ()), *response[:index]]
            request.sampling_params = copy.copy(template.sampling_params)
            request.sampling_params.logprobs, request.sampling_params.logprob_token_ids = None, [token]
            templates.append(request)
        return templates

    def add(self, request_id: str, template: EngineCoreRequest, index: int) -> None:
        """Queue completion `index` of the template; seeded templates seed it with `seed + index`."""
        request: Any = copy.copy(template)
        request.request_id = request.external_req_id = request_id
        request.cache_salt = self._salt
        parameters: Any = template.sampling_params
        if parameters.seed is not None:
            request.sampling_params = copy.copy(parameters)
            request.sampling_params.seed = parameters.seed + index
        if parameters.logprob_token_ids is not None:
            self._scoring.add(request_id)
        self._client.add_request(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, running or waiting."""
        self._client.abort_requests(list(request_ids))
        self._scoring.difference_update(request_ids)

    def step(self) -> list[Sampled]:
        """Sample one token of each running request."""
        return [self._sampled(output) for output in self._client.get_output().outputs]

    def _sampled(self, output: Any) -> Sampled:
        # Columns: the sampled token, then the one asked for. A step that scores for one request pads the others' rows with -inf.
        column = int(output.request_id in self._scoring)
        if output.finish_reason is not None:
            self._scoring.discard(output.request_id)
        return Sampled(
            output.request_id,
            output.new_token_ids,
            [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, column].tolist(),
            None if output.finish_reason is None else str(output.finish_reason),
        )

    def load(self, meeting: Meeting, group: str, manifest: WeightManifest) -> tuple[Receipt, int]:
        """Receive a publish and load it; (receipt, number of bytes). Nothing may be stepped meanwhile."""
        own = {"group": group, "member": meeting.member, "deadline_s": meeting.deadline.left_s}
        entries = [(entry.name, entry.shape, entry.dtype) for entry in manifest.entries]
        self._rpc("init_weight_transfer_engine", asdict(meeting.rendezvous) | own)
        self._rpc("start_weight_update")
        self._rpc("update_weights", {"entries": entries})
        self._rpc("finish_weight_update")
        num_tensors, num_bytes, checksum = self._rpc("weight_receipt")
        return Receipt(num_tensors, checksum), num_bytes

    def leave_group(self) -> None:
        """Drop the data group after a failed transfer."""
        self._rpc("shutdown_weight_transfer_engine")

    def begin_version(self, version: int, *, recompute: bool) -> None:
        """Forget what older weights computed.

        `recompute` preempts running requests: their keys and values are computed anew from the prompt and the tokens so far.
        Otherwise they keep theirs; later requests cannot read them, because their salt differs.
        """
        self._salt = f"v{version}"
        self._client.set_weight_version(str(version))
        # Answers False while running requests keep blocks, which then leave the cache as those requests end.
        self._client.reset_prefix_cache(reset_running_requests=recompute)
        self._llm.renderer.clear_mm_cache()
        self._client.reset_mm_cache()
        self._client.reset_encoder_cache()

    def _rpc(self, method: str, *arguments: Any) -> Any:
        """Run a method of vLLM's worker, on all workers; the first one's result."""
        results: list[Any] = self._client.collective_rpc(method, args=arguments)
        return results[0]

    def close(self) -> None:
        """Release the engine's memory and its groups."""
        self._client.shutdown()


def _arguments(config: Config, mm_processor_kwargs: Mapping[str, Any], seed: int) -> EngineArgs:
    section = config.cluster.generators
    on_cpu: dict[str, Any] = {
        "kv_cache_memory_bytes": int(section.kv_cache_gib * 2**30),
        "block_size": BLOCK_TOKENS,
        "enforce_eager": True,
    }
    if config.sampling.seeded:
        # A prompt that is computed in parts draws, and vLLM then winds its generator back, which no generator of a CPU can.
        on_cpu["enable_chunked_prefill"] = False
    on_gpu: dict[str, Any] = {
        "gpu_memory_utilization": section.memory_share,
        "enforce_eager": section.enforce_eager,
        "tensor_parallel_size": max(section.gpus, 1),
    }
    of_images: dict[str, Any] = {
        "limit_mm_per_prompt": {"video": 0},
        "mm_processor_kwargs": dict(mm_processor_kwargs),
        # Each image is processed once per group as it is; a cache would be shared between threads.
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": not section.gpus,
    }
    return EngineArgs(
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_len=section.max_model_len,
        max_num_seqs=section.max_sequences,
        max_num_batched_tokens=section.max_batched_tokens,
        logprobs_mode="processed_logprobs",
        # The folder's sampling defaults (top-p, penalties) must not creep in; ends of a response come from our preprocessor.
        generation_config="vllm",
        weight_transfer_config=WeightTransferConfig(backend=transfer.BACKEND),
        worker_extension_cls=transfer.EXTENSION,
        # A step's tokens must all be sampled and counted before weights change.
        async_scheduling=False,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        seed=seed,
        **(on_gpu if section.gpus else on_cpu),
        **(of_images if mm_processor_kwargs else {}),
    )


def _keep_pixels() -> None:
    """Let workers keep the pixels of images whose keys and values came from the prefix cache.

    vLLM drops them, for good, when it first schedules such a request. Its model runner for the CPU keeps what it got then, so
    the request cannot be recomputed once it was preempted (by `begin_version`, or for want of blocks) and the cached prefix is
    gone: the step fails with an embedding too few. Here scheduler and worker share one process, so keeping them costs nothing.
    """
    scheduled: Any = output
    scheduled.strip_covered_mm_data = lambda mm_features, num_computed_tokens, uses_mrope=False: mm_features


def _register(folder: str) -> None:
    """Our transport; and the model's class, here: vLLM would inspect it in a second process, which takes as long as a start."""
    if transfer.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(transfer.BACKEND, transfer.GroupTransferEngine)
    from transformers import AutoConfig

    for architecture in AutoConfig.from_pretrained(folder, local_files_only=True).architectures or ():
        found = ModelRegistry.models.get(architecture)
        if found is not None:
            ModelRegistry.register_model(architecture, found.load_model_cls())
