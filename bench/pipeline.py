"""A scored group's way through real processes and sockets, with what each process spends on it. Used by `bench.control_plane`.

    Source ──Group──▶ Front ──ScoredGroup──▶ Ranks (2)        the learner's inbox, as `learner.rank` keeps it
                        └───────────────────▶ Recording        the product's recorder: journal, then a version's archive

Only the tokens and the verdicts are made up.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import bench.english
from actors.recorder import Recorder
from actors.verifier_pool import VerifierPoolActor, without_texts
from bench.english import English
from learner.batch.examples import example
from learner.batch.inbox import GroupInbox
from verifiers import ImageSize, RewardSpec, Verdict
from verifiers.texts import Decoder
from vtriune import roles
from vtriune.config.tree import Config, Model, Tracking
from vtriune.messages import (
    Group,
    GroupReport,
    Lease,
    SampleHeader,
    SampleRef,
    Sampling,
    ScoredGroup,
    StepRecord,
    TrainOrder,
    Trajectory,
    VersionSpan,
)
from vtriune.plan.simulated_device import Lengths
from vtriune.record import archive
from vtriune.record.archive import Archived
from vtriune.runtime import Actor, endpoint, this_host
from vtriune.transport import codec

GROUP_SIZE, PROMPT_TOKENS = 8, 1000
NUM_RANKS = 2
_IN_FLIGHT, _NUM_FIRST = 64, 8
_GOLD = "[{'bbox_2d': [12, 40, 380, 222], 'label': 'cat'}, {'bbox_2d': [401, 33, 620, 470], 'label': 'dog'}]"


class Part(msgspec.Struct, frozen=True):
    """One process's work on all groups."""

    cpu_s: float
    num_bytes: float
    """Sent, kept or written."""


class Flow(msgspec.Struct, frozen=True):
    """What the way of `num_groups` took."""

    num_groups: int
    parts: dict[str, Part]


def make_groups(num_groups: int, decoder: Decoder, num_tokens: int | None) -> list[Group]:
    """Groups of English; every completion of `num_tokens`, or of the plan's lengths."""
    text, groups = English(decoder), []
    for number in range(num_groups):
        lengths = Lengths().draw(0, number, GROUP_SIZE).tolist() if num_tokens is None else [num_tokens] * GROUP_SIZE
        header = SampleHeader("detection", RewardSpec(_GOLD, "detection"), f"sample-{number}", "train.parquet", number)
        lease = Lease(number, 0, SampleRef("f00dcafe", number), header, GROUP_SIZE, Sampling())
        trajectories = [_trajectory(text, decoder, length) for length in lengths]
        prompt_ids = np.full(PROMPT_TOKENS, 9, np.int32)
        prompt_ids[:200] = text.ids(200)
        groups.append(Group(lease, prompt_ids, trajectories, number % 64, 4.5, [ImageSize((640, 480), (644, 476))]))
    return groups


def _trajectory(text: English, decoder: Decoder, length: int) -> Trajectory:
    ids, half = text.ids(length), length // 2
    spans = [VersionSpan(7, half), VersionSpan(8, length - half)] if half else [VersionSpan(8, length)]
    return Trajectory(ids, text.logprobs(length), spans, "stop", decoder.decode(ids.tolist()))


def make_verdicts(num: int) -> list[Verdict]:
    """As detection gives them."""
    scores = dict.fromkeys(("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map"), 0.25)
    return [Verdict("ok", index / num, index / num, 1.0, scores, "") for index in range(num)]


class Clock(Actor):
    """Processor time of its process."""

    @endpoint
    async def cpu_s(self) -> float:
        return time.process_time()


class Source(Clock):
    """Generators' end: hands groups on and takes their reports, 64 at a time."""

    def __init__(self, verifiers: roles.VerifierPool) -> None:
        self._verifiers = verifiers
        self._groups: list[Group] = []

    @endpoint
    async def make(self, model: str, num_groups: int, num_tokens: int | None) -> None:
        """What `send` sends."""
        self._groups = make_groups(num_groups, decoder_in(Path(model)), num_tokens)

    @endpoint
    async def send(self, first: int, last: int) -> None:
        """Those numbers, without the last."""
        turns = asyncio.Semaphore(_IN_FLIGHT)

        async def score(group: Group) -> GroupReport:
            async with turns:
                report: GroupReport = await self._verifiers.score.choose(group)
                return report

        await asyncio.gather(*(score(group) for group in self._groups[first:last]))


class CannedPool:
    """In place of scoring."""

    async def start(self) -> None:
        pass

    async def score(self, responses: Sequence[str], *_: Any) -> list[Verdict]:
        return make_verdicts(len(responses))

    async def close(self) -> None:
        pass


class Front(VerifierPoolActor, Clock):
    """The product's front, over verdicts that cost nothing."""

    def __init__(self, config: Config, learner: roles.Learner, recorder: roles.Recorder) -> None:
        super().__init__(config, learner, recorder)
        self._pool: Any = CannedPool()


class Rank(Clock):
    """A learner rank's inbox."""

    def __init__(self) -> None:
        self._inbox = GroupInbox()
        self._num_bytes = 0

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        """As `learner.rank` does."""
        item = await asyncio.to_thread(example, scored, scale_by_std=True)
        self._inbox.add(item)
        trajectories = scored.group.trajectories
        self._num_bytes += sum(t.token_ids.nbytes + t.logprobs.nbytes + len(t.text) for t in trajectories)

    @endpoint
    async def num_bytes(self) -> int:
        """Of the tokens, log-probs and texts that it holds."""
        return self._num_bytes


class TimedRecorder(Recorder, Clock):
    """The product's recorder, with the clock."""


def decoder_in(model: Path) -> Decoder:
    """Of the folder's tokenizer."""
    return bench.english.decoder(model / "tokenizer.json")


async def flow(folder: Path, num_groups: int, num_tokens: int | None) -> Flow:
    """Send groups through; `folder` holds `model/` with a tokenizer, see `write_model`, and takes what the recorder writes."""
    config = Config(model=Model(path=str(folder / "model")), tracking=Tracking(wandb="off"))
    names = {"source": 1, "front": 1, "rank": NUM_RANKS, "recorder": 1}
    procs = {name: this_host().spawn_procs(per_host={"procs": count}, name=name) for name, count in names.items()}
    try:
        ranks = procs["rank"].spawn("rank", Rank)
        recorder = procs["recorder"].spawn("recorder", TimedRecorder, config, str(folder))
        front = procs["front"].spawn("front", Front, config, ranks, recorder)
        source: Any = procs["source"].spawn("source", Source, front)
        actors: dict[str, Any] = {"source": source, "front": front, "rank": ranks, "recorder": recorder}
        await source.make.call_one(str(folder / "model"), _NUM_FIRST + num_groups, num_tokens)
        await front.ready.call()
        # The first groups load what is loaded once.
        await source.send.call_one(0, _NUM_FIRST)
        await recorder.record_step.call_one(_step(8, range(_NUM_FIRST)))
        await recorder.truncate_after.call_one(9)
        held = (await ranks.num_bytes.call()).rank_value(0)
        before = await _cpu_s(actors)
        await source.send.call_one(_NUM_FIRST, _NUM_FIRST + num_groups)
        sent = await _cpu_s(actors)
        journal_bytes = (folder / "rollouts" / "journal").stat().st_size
        await recorder.record_step.call_one(_step(9, range(_NUM_FIRST, _NUM_FIRST + num_groups)))
        await recorder.close.call_one()
        written = await _cpu_s(actors)
        inbox_bytes = (await ranks.num_bytes.call()).rank_value(0) - held
    finally:
        await asyncio.gather(*(mesh.stop() for mesh in procs.values()))
    group = make_groups(1, decoder_in(folder / "model"), num_tokens)[0]
    wire = codec.pack((group,)).num_bytes
    scored = ScoredGroup(group, make_verdicts(GROUP_SIZE))
    to_ranks = NUM_RANKS * codec.pack((without_texts(scored),)).num_bytes
    archive_bytes = (folder / "rollouts" / "version-000010.parquet").stat().st_size
    spent = {name: sent[name] - before[name] for name in actors}
    parts = {
        "generators' end": Part(spent["source"], num_groups * wire),
        "pool front": Part(spent["front"], num_groups * (to_ranks + codec.pack((scored,)).num_bytes)),
        "learner's inbox, a rank": Part(spent["rank"], inbox_bytes),
        "recorder: take in, journal": Part(spent["recorder"], journal_bytes),
        "recorder: line, archive": Part(written["recorder"] - sent["recorder"], archive_bytes),
        "recorder, all in all": Part(written["recorder"] - before["recorder"], journal_bytes + archive_bytes),
    }
    return Flow(num_groups, parts)


def _step(version: int, groups: range) -> StepRecord:
    order = TrainOrder(version, [list(groups)], "off_policy", 2, 2, "decoupled", [0.0, 0.1])
    return StepRecord(version + 1, 1, {}, order)


async def _cpu_s(actors: dict[str, Any]) -> dict[str, float]:
    """Of each actor's process, the mean over its ranks."""
    answers = {name: await actor.cpu_s.call() for name, actor in actors.items()}
    return {name: float(np.mean([value for _, value in mesh.items()])) for name, mesh in answers.items()}


def write_model(folder: Path, tokenizer: Path | None) -> None:
    """A model's folder as far as the recorder reads it: `tokenizer`, or one trained on the text."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(bench.english.decoder(tokenizer).content)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bench.english.END, "chat_template": "-"}
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))


def archive_bytes_per_token(folder: Path, decoder: Decoder, *, keeps_logprobs: bool) -> float:
    """Of as many groups as the text has without repeating itself."""
    num_groups = English(decoder).num_tokens // (GROUP_SIZE * 600)
    groups = [Archived(8, ScoredGroup(g, make_verdicts(GROUP_SIZE))) for g in make_groups(num_groups, decoder, 512)]
    path = archive.write(folder, "version", 1, groups, decoder=decoder, keeps_logprobs=keeps_logprobs)
    return path.stat().st_size / (num_groups * GROUP_SIZE * 512)
