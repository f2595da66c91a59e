"""Difficulty by sampling: the model and sampling of a run's file answer every row several times, verifiers judge. Called by the
command. The engine is vLLM's, in a process of its own: vLLM does not start where numba is loaded, as it is by a check of the data.

Boxes are judged at `rewards.evaluation_threshold`, as in an evaluation: the paper's cumulative IoU reward has .5.
"""

import asyncio
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from verifiers import Verdict
from verifiers.pool.pool import VerifierPool
from vtriune.config.tree import Config
from vtriune.curate.difficulty import Difficulty, Key, difficulties
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import DataError
from vtriune.data.store import Store, StoreSet
from vtriune.messages import Group, Lease, SampleHeader, Sampling
from vtriune.runtime import Actor, endpoint, this_host

log = logging.getLogger(__name__)


class Judged(NamedTuple):
    """A sampled answer."""

    header: SampleHeader
    verdict: Verdict


class Sampled(msgspec.Struct, frozen=True):
    """What `Sampler` found of a row."""

    key: Key
    difficulty: Difficulty


class Sampler(Actor):
    """One engine and one pool of verifiers, while a call lasts."""

    @endpoint
    async def sample(self, config: Config, store: str, num_answers: int) -> list[Sampled]:
        """Of every row of the store in that folder. Raises what keeps the engine from starting."""
        found = await _sample(config, Store.open(store), num_answers)
        return [Sampled(key, difficulty) for key, difficulty in found.items()]


def sample_difficulties(config: Config, store: Path, num_answers: int) -> dict[Key, Difficulty]:
    """Of every row of the store in that folder that has an id, from `num_answers` answers; progress is told on stderr. A row that
    cannot be answered is logged and has none. Raises ActorError with what keeps the engine from starting."""
    procs = this_host().spawn_procs(per_host={"procs": 1})
    try:
        sampler = procs.spawn("sampler", Sampler)
        found = sampler.sample.call_one(config, str(store.absolute()), num_answers).get()
        return {each.key: each.difficulty for each in found}
    finally:
        procs.stop().get()


async def _sample(config: Config, store: Store, num_answers: int) -> dict[Key, Difficulty]:
    from actors.engine import Engine, EngineError

    data, rewards = config.data, config.rewards
    preprocessor = Preprocessor(Path(config.model.path), data.min_pixels, data.max_pixels, data.max_prompt_tokens)
    # First, before anything scores.
    engine = Engine(config, preprocessor, StoreSet([store]))
    memory = int(rewards.memory_gib * 2**30)
    pool = VerifierPool(config.cluster.verifiers.workers, rewards.options, memory_limit_bytes=memory)
    stored = store.distinct_rows()
    rows = [row for row in stored if store.header(row).sample_id]
    if len(rows) < len(stored):
        log.warning(
            "%d of %d rows have no id, by which answers are known, and are not sampled",
            len(stored) - len(rows),
            len(stored),
        )
    judged: list[Judged] = []
    # As many rows at once as fill the engine: the next is prepared when one is answered.
    room = asyncio.Semaphore(max(1, 2 * config.cluster.generators.max_sequences // num_answers))

    async def answer(row: int) -> None:
        async with room:
            lease = _lease(config, store, row, num_answers)
            try:
                judged.extend(await _judged(await engine.generate(lease), pool))
            except (DataError, EngineError) as error:
                if getattr(error, "kind", "lease") == "engine":
                    raise
                log.warning("row %d of %s is not sampled: %s", lease.header.file_row, lease.header.file, error)
            left.remove(row)
            if len(left) * 10 % len(rows) < 10:  # At every tenth of them.
                print(f"{len(rows) - len(left)} of {len(rows)} rows answered", file=sys.stderr)

    left = set(rows)
    try:
        await pool.start()
        async with asyncio.TaskGroup() as answering:
            for row in rows:
                answering.create_task(answer(row))
    except ExceptionGroup as failed:
        # The engine has stopped, of which every row under way tells.
        raise failed.exceptions[0] from None
    finally:
        await engine.close()
        await pool.close()
    faults = [each.verdict.reason for each in judged if each.verdict.status == "fault"]
    if faults:
        log.warning(
            "%d of %d answers could not be judged, and do not count; the first: %s", len(faults), len(judged), faults[0]
        )
    return difficulties(judged, rewards.options)


def _lease(config: Config, store: Store, row: int, num_answers: int) -> Lease:
    sampling, seed = config.sampling, config.run.seed
    of_row = seed + row * num_answers if sampling.seeded else None
    drawn = Sampling(sampling.temperature, sampling.max_tokens, of_row, sampling.top_p, sampling.top_k)
    return Lease(
        group_id=row,
        attempt=0,
        sample=store.ref(row),
        header=store.header(row),
        num_completions=num_answers,
        sampling=drawn,
        purpose="evaluate",
        progress=None,
        prompt_seed=seed + row if config.data.prompt_pool else None,
    )


async def _judged(group: Group, pool: VerifierPool) -> list[Judged]:
    header, responses = group.lease.header, [trajectory.text for trajectory in group.trajectories]
    num = len(responses)
    verdicts = await pool.score(
        responses, [header.reward] * num, None, [header.source] * num, [group.image_sizes] * num
    )
    return [Judged(header, verdict) for verdict in verdicts]
