"""What a generator has of its engine: groups of completions, new weights, the canary, figures.

generate   prepare and render (preparation thread) ─▶ loop ─▶ trajectories with their version spans
receive    meet, agree (publish thread, the loop goes on) ─▶ hold ─▶ transfer, load, reset ─▶ release
"""

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np

from actors.engine import environment
from actors.engine.completions import Completion
from actors.engine.loop import EngineBroken, EngineError, StepLoop
from verifiers import ImageSize
from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor, Prompt
from vtriune.data.schema import DataError
from vtriune.data.store import StoreSet
from vtriune.messages import (
    Canary,
    Group,
    Lease,
    PublishOrder,
    PublishReport,
    Sampling,
    Trajectory,
    VersionSpan,
)
from vtriune.weights.meeting import Deadline, Meeting, Proposal, PublishFailure, Receipt, held_as

T = TypeVar("T")
InFlight = Literal["continue", "recompute", "drain"]


class Engine:
    """vLLM with our model, from construction (which takes seconds to minutes) to `close`. Methods are called from one
    asyncio loop; several may be awaited at once."""

    def __init__(self, config: Config, preprocessor: Preprocessor, samples: StoreSet, rank: int = 0) -> None:
        self._config = config
        self._preprocessor = preprocessor
        self._samples = samples
        self._rank = rank
        self.in_flight: InFlight = config.policy.in_flight
        self._core = _core(config, preprocessor, rank)
        self._expectation = self._core.expectation(config.model.path)
        self._group = ""
        # One thread each: vLLM's rendering is not safe for two, and publishes come one after another.
        self._preparing = ThreadPoolExecutor(1, "prepare", initializer=self._core.limit_threads)
        self._publishing = ThreadPoolExecutor(1, "publish", initializer=self._core.limit_threads)
        self._loop = StepLoop(self._core)
        self._loop.start()
        self._loop.call(self._core.limit_threads)

    @property
    def version(self) -> int:
        """The version sampled from."""
        return self._loop.version

    async def generate(self, lease: Lease) -> Group:
        """Sample the lease's completions. Raises DataError for a sample that cannot be prepared, EngineError when the engine
        refuses it or has stopped. Cancelling it frees the engine."""
        start = time.monotonic()
        prompt_ids, template, image_sizes = await self._in(self._preparing, self._prepare, lease)
        ticket = self._loop.submit(template, lease.num_completions, lease.first_completion)
        try:
            completions = await asyncio.wrap_future(ticket.done)
        except asyncio.CancelledError:
            self._loop.cancel(ticket)
            raise
        trajectories = [self._trajectory(completion, lease) for completion in completions]
        return Group(lease, prompt_ids, trajectories, self._rank, time.monotonic() - start, image_sizes)

    async def receive(self, order: PublishOrder) -> PublishReport:
        """Take part in a publish and sample from its version afterwards.

        Raises PublishFailure when it fails: PeerFailure when the cause is elsewhere. The engine goes on with the weights it had,
        unless loading itself broke, which ends the engine.
        """
        return await self._in(self._publishing, self._receive, order)

    async def score(self, canary: Canary) -> list[float]:
        """Log-prob of each token of the canary's response, by the sampling path: temperature, pads and all."""
        sampling = Sampling(temperature=self._config.sampling.temperature or 1.0, max_tokens=1)
        templates = await self._in(self._preparing, self._scored, canary, sampling)
        tickets = [self._loop.submit(template, 1) for template in templates]
        done = await asyncio.gather(*(asyncio.wrap_future(ticket.done) for ticket in tickets))
        return [completions[0].logprobs[0] for completions in done]

    def stats(self) -> dict[str, float]:
        """Shares of the time and rates since the last call, and what is in flight now."""
        return {
            **self._loop.pace.read(),
            "running": float(self._loop.num_running),
            "waiting": float(self._loop.num_waiting),
            "version": float(self._loop.version),
        }

    async def close(self) -> None:
        """End the threads and vLLM; groups in flight fail. Idempotent."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._loop.close()
        self._preparing.shutdown(cancel_futures=True)
        self._publishing.shutdown(cancel_futures=True)
        self._core.close()

    async def _in(self, executor: Executor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)

    def _prepare(self, lease: Lease) -> tuple[np.ndarray, Any, list[ImageSize]]:
        prompt = self._preprocessor.prepare(self._samples.get(lease.sample), lease.prompt_seed)
        template = self._render(prompt, lease.sampling, lease.sampling.max_tokens)
        return self._preprocessor.check_expansion(prompt, template.prompt_token_ids), template, prompt.image_sizes

    def _scored(self, canary: Canary, sampling: Sampling) -> list[Any]:
        prompt = self._preprocessor.prepare(self._samples.get(canary.sample))
        template = self._render(prompt, sampling, len(canary.response_ids))
        self._preprocessor.check_expansion(prompt, template.prompt_token_ids)
        templates: list[Any] = self._core.scored(template, canary.response_ids.tolist())
        return templates

    def _render(self, prompt: Prompt, sampling: Sampling, num_tokens: int) -> Any:
        """A template with room for `num_tokens` after the prompt."""
        try:
            template = self._core.render(prompt.engine_ids, prompt.images, sampling)
        except DataError:  # Of an image that cannot be decoded; it names the row.
            raise
        except ValueError as error:
            raise EngineError(f"{prompt.where}the engine refused the prompt: {error}") from error
        needed = len(template.prompt_token_ids) + num_tokens
        if needed > self._core.max_model_len:
            raise EngineError(
                f"{prompt.where}prompt and response may take {needed} tokens, cluster.generators.max_model_len is "
                f"{self._core.max_model_len}; raise it, or lower sampling.max_tokens or data.max_pixels"
            )
        return template

    def _trajectory(self, completion: Completion, lease: Lease) -> Trajectory:
        logprobs = np.asarray(completion.logprobs, np.float32)
        if not np.isfinite(logprobs).all():
            raise EngineError(
                f"group {lease.group_id}, completion {completion.index}: sampled a token of log-prob "
                f"{logprobs[~np.isfinite(logprobs)][0]} at version {self.version}; the weights are not finite"
            )
        assert completion.finish is not None
        return Trajectory(
            np.asarray(completion.token_ids, np.int32),
            logprobs,
            [VersionSpan(*span) for span in completion.spans],
            completion.finish,
            self._preprocessor.decode(completion.token_ids),
        )

    def _receive(self, order: PublishOrder) -> PublishReport:
        start, mode = time.monotonic(), self.in_flight
        meeting = Meeting(order.rendezvous, order.member, Deadline(order.deadline_s))
        # Draining takes as long as the longest completion: begun before the others are there.
        held = self._loop.hold(drain=True) if mode == "drain" else None
        try:
            proposal = meeting.arrive(self._group)
            with meeting.phase("agree"):
                self._expectation.match(proposal.manifest.entries, full=order.full)
            meeting.consent()
            with meeting.phase("transfer"):
                self._stand_still(held or self._loop.hold(drain=False), meeting.deadline)
                receipt, num_bytes = self._loop.call(lambda: self._load(meeting, proposal, mode)).result()
        except BaseException:
            # Also when the process is ending: whoever waits in the data group is set free by leaving it.
            self._group = ""
            self._loop.call(self._core.leave_group)
            raise
        finally:
            pause = self._loop.release()
        meeting.deliver_receipt(receipt)
        elapsed = time.monotonic() - start
        return PublishReport(order.version, receipt.num_tensors, num_bytes, receipt.checksum, elapsed, pause.result())

    def _stand_still(self, held: "Future[None]", deadline: Deadline) -> None:
        try:
            held.result(timeout=deadline.left_s)
        except TimeoutError:
            running = self._loop.num_running
            raise PublishFailure(
                "transfer", f"{running} completions have not drained within {deadline.seconds:g} s"
            ) from None

    def _load(self, meeting: Meeting, proposal: Proposal, mode: InFlight) -> tuple[Receipt, int]:
        """In the loop's thread, nothing running or all of it standing still."""
        loaded: tuple[Receipt, int] = self._core.load(meeting, proposal.group, proposal.manifest)
        self._group = held_as(proposal.group, meeting.member)
        version = proposal.manifest.version
        try:
            self._core.begin_version(version, recompute=mode == "recompute")
        except Exception as error:
            # New weights with caches of the old ones: nothing sampled from here on could be trusted.
            raise EngineBroken(f"the caches could not be reset after loading version {version}: {error}") from error
        self._loop.version = version
        return loaded


def _core(config: Config, preprocessor: Preprocessor, rank: int) -> Any:
    """vLLM is imported here, after its environment is set."""
    environment.settle(config.cluster.generators)
    # Six thousand modules: nothing of it is garbage, and looking for some takes a tenth of the start.
    gc.disable()
    try:
        from actors.engine.vllm_core import VllmCore

        return VllmCore(
            config,
            pad_token_ids=preprocessor.pad_token_ids,
            end_token_ids=preprocessor.end_token_ids,
            mm_processor_kwargs=preprocessor.mm_processor_kwargs(),
            seed=config.run.seed * 1009 + rank,
        )
    finally:
        gc.enable()
