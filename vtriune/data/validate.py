"""What makes a row unfit to train on: broken images, markers that don't match, prompts too long, rewards that can't be earned.

`build_store` asks `Checks.examine` for every batch of rows and adds file and row to each reason. It runs once per store, in a
single pass that scales with cores:

- every picture is decoded as it will be for the model, on threads (Pillow's decoders release the GIL); a PNG's checksums are compared
  besides, which its decoder leaves out. What is changed by it, and what takes long, is noted;
- gold boxes are compared with the picture they lie on;
- gold answers are scored by the reward library's pool, whose workers can be killed: math-verify may spin on one for ever;
- prompts are tokenized, a batch at a time.
"""

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace
from PIL import Image

import verifiers
from verifiers import ImageSize, RewardOptions, RewardSpec
from verifiers.pool.pool import VerifierPool
from verifiers.registry import GoldError
from verifiers.scoring import GOLD_ACCURACY, gold_response
from verifiers.tags import CLOSE, OPEN, TAGS
from verifiers.types import MEMORY_GIB
from vtriune.data import pictures
from vtriune.data.box_frames import BoxCensus, box_problem, corners, gold_frame
from vtriune.data.findings import Finding
from vtriune.data.measures import Look, Measures, look
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import IMAGE_MARKER, DataError, Sample

SLOW_S = 1.0
"""Processor time from which on a picture's decoding is noted: it is paid each time the row is drawn, by generator and learner."""
_SHORT_ANSWERS = ("mathverify", "counting", "multiple_choice", "ocr")
"""Verifiers whose `answer` can be compared with `ground_truth` by themselves."""
_WRAPPING = re.compile(r"\\boxed|</?answer>|[\s{}$]")


class Checks:
    """Every check of a row, as `build_store` applies them; `close` ends the helper processes, the next use starts new ones.

    preprocessor  measures prompts; None: length and image size are not checked
    options       how gold answers are scored; None: the reward library's defaults
    prompt_pool   count the longest sentences of the prompt pool into a mathverify prompt
    num_workers   threads for images and processes for gold answers; None: half the processors, 1 to 8
    memory_bytes  address space of such a process
    max_source_pixels  width · height of the largest picture that is read; None: any
    """

    def __init__(
        self,
        preprocessor: Preprocessor | None = None,
        options: RewardOptions | None = None,
        prompt_pool: bool = False,
        num_workers: int | None = None,
        memory_bytes: int = int(MEMORY_GIB * 2**30),
        max_source_pixels: int | None = None,
    ) -> None:
        num_workers = num_workers or min(8, max(1, len(os.sched_getaffinity(0)) // 2))
        self._preprocessor = preprocessor
        self._options = options or RewardOptions()
        self._prompt_pool = prompt_pool
        self._num_workers = num_workers
        self._memory_bytes = memory_bytes
        self._max_source_pixels = max_source_pixels
        self._golds: _Golds | None = None
        self._censuses: dict[tuple[str, str], BoxCensus] = {}

    @property
    def identity(self) -> str:
        """Hash of limits, tokenizer, reward options, and the code of the reward library and of this package."""
        digest = hashlib.sha256(msgspec.json.encode(self._options))
        limits = (
            f"{self._prompt_pool} {self._max_source_pixels} {self._preprocessor.identity if self._preprocessor else ''}"
        )
        digest.update(limits.encode())
        code = (Path(verifiers.__file__).parent, Path(pictures.__file__).parent)
        for path in chain.from_iterable(sorted(folder.rglob("*.py")) for folder in code):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def examine(self, samples: Sequence[Sample]) -> list[Finding]:
        """What there is to say of each sample, in order."""
        self._golds = self._golds or _Golds(self._options, self._num_workers, self._memory_bytes)
        sizes = [self._image_sizes(sample) for sample in samples]
        golds = self._golds.begin([sample.reward for sample in samples], [known or () for known in sizes])
        with ThreadPoolExecutor(max_workers=self._num_workers, thread_name_prefix="image-check") as threads:
            pictures_seen = threads.map(self._pictures, samples)
            # Beside the threads, whose decoders leave the interpreter free.
            lengths = self._prompt_lengths(samples)
            seen = list(pictures_seen)
        findings = []
        for sample, view, length, gold, known in zip(samples, seen, lengths, golds.result(), sizes, strict=True):
            # A broken image has no size to count tokens of: the prompt is measured once its images are sound.
            problems = view.problems or ([length] if isinstance(length, str) else [])
            # What is known to be wrong with a gold answer says more than what it scores; without the sizes of its images a gold may be
            # unfit only for want of them.
            said = _gold_problem(sample) or (None if known is None else gold)
            problems += [] if said is None else [f"reward_model: {said}"]
            if problems or isinstance(length, str):
                findings.append(Finding(problems, view.notes))
                continue
            measures = self._measures(sample, view, known or [], length)
            findings.append(Finding([], view.notes + self._box_notes(sample, view.sizes), measures))
        return findings

    def _measures(self, sample: Sample, view: "_View", sizes: Sequence[ImageSize], tokens: int | None) -> Measures:
        prompt = "\n".join(turn.content for turn in sample.prompt)
        boxes = corners(sample.reward)
        return Measures(
            sizes=view.sizes,
            resized=[size.resized for size in sizes] if self._preprocessor is not None else [],
            num_changed=view.num_changed,
            looks=view.looks,
            prompt_tokens=tokens,
            question=int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "big"),
            answer_chars=len(sample.reward.gold),
            num_boxes=len(boxes) if sample.reward.verifier == "detection" else None,
        )

    def remarks(self) -> Mapping[str, list[str]]:
        """What the rows examined say together, by source: frames of gold boxes that are probably others."""
        found: dict[str, list[str]] = {}
        for (source, _), census in self._censuses.items():
            if (remark := census.remark()) is not None:
                found.setdefault(source, []).append(remark)
        return found

    def close(self) -> None:
        """End helper processes. Idempotent."""
        golds, self._golds, self._censuses = self._golds, None, {}
        if golds is not None:
            golds.close()

    def _image_sizes(self, sample: Sample) -> list[ImageSize] | None:
        """As a run will hand them to the verifier; without a model nothing is resized. None where an image cannot be read, which
        `_pictures` tells."""
        try:
            if self._preprocessor is not None:
                return self._preprocessor.image_sizes(sample)
            return [ImageSize(size, size) for size in map(pictures.size, sample.images)]
        except DataError:
            return None

    def _pictures(self, sample: Sample) -> "_View":
        """The sample's pictures, all decoded."""
        view = _View([], [], [], [], 0)
        for index, data in enumerate(sample.images):
            start_s = time.thread_time()
            try:
                pictures.compare_checksums(data)
                picture, changes = pictures.examine(data, self._max_source_pixels)
            except DataError as error:
                view.problems.append(f"images[{index}] {error}")
                continue
            view = view.with_picture(picture, changes)
            took_s = time.thread_time() - start_s
            if took_s > SLOW_S:
                width, height = picture.size
                view.notes.append(
                    f"takes {took_s:.1f} s to decode each time it is drawn, {width}x{height} px: reduce it"
                )
        return view._replace(notes=list(dict.fromkeys(view.notes)))

    def _box_notes(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> list[str]:
        parm = sample.reward.verifier_parm or {}
        number = parm.get("image") or 0
        boxes = corners(sample.reward)
        if not boxes or not isinstance(number, int) or not 0 <= number < len(sizes):
            return []
        frame = gold_frame(parm)
        note = self._censuses.setdefault((sample.source, frame), BoxCensus(frame)).add(boxes, sizes[number])
        return [] if note is None else [note]

    def _prompt_lengths(self, samples: Sequence[Sample]) -> Sequence[int | str | None]:
        """Of each sample its prompt's tokens, None without a model, or what is wrong with the prompt."""
        if self._preprocessor is not None:
            return self._preprocessor.prompt_lengths(samples, self._prompt_pool)
        return [_marker_problem(sample) for sample in samples]


class _View(NamedTuple):
    """A sample's pictures, as far as they can be decoded."""

    problems: list[str]
    notes: list[str]
    sizes: list[tuple[int, int]]
    looks: list[Look]
    num_changed: int

    def with_picture(self, picture: Image.Image, changes: Sequence[str]) -> "_View":
        sizes, looks = [*self.sizes, picture.size], [*self.looks, look(picture)]
        return _View(self.problems, [*self.notes, *changes], sizes, looks, self.num_changed + bool(changes))


def _marker_problem(sample: Sample) -> str | None:
    num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in sample.prompt if turn.role == "user")
    if num_markers != len(sample.images):
        return f"the prompt has {num_markers} {IMAGE_MARKER} markers for {len(sample.images)} images"
    return None


class _Golds:
    """A verifier pool with its event loop, both in a thread of their own."""

    def __init__(self, options: RewardOptions, num_workers: int, memory_bytes: int) -> None:
        self._thread, self._runner = ThreadPoolExecutor(1, "gold-check"), asyncio.Runner()
        # No share of faults stops it: a file of bad golds is to be listed.
        self._pool = VerifierPool(num_workers, options, memory_limit_bytes=memory_bytes, fault_limit=1.0)
        self._is_started = False

    def begin(self, specs: Sequence[RewardSpec], sizes: Sequence[Sequence[ImageSize]]) -> "Future[list[str | None]]":
        """Start checking; the result says why each row's gold answer cannot be trained on, in order; None where it can."""
        return self._thread.submit(lambda: self._runner.run(self._check(specs, sizes)))

    async def _check(self, specs: Sequence[RewardSpec], sizes: Sequence[Sequence[ImageSize]]) -> list[str | None]:
        if not self._is_started:
            await self._pool.start()
            self._is_started = True
        found = await self._pool.check_golds(specs, sizes)
        for index, problem in (await self._disagreements(specs)).items():
            found[index] = found[index] or problem
        return found

    async def _disagreements(self, specs: Sequence[RewardSpec]) -> dict[int, str]:
        """What is wrong with the rows whose `answer` is another than their `ground_truth` in their own verifier's judgement."""
        responses: dict[int, str] = {}
        for index, spec in enumerate(specs):
            is_comparable = spec.verifier in _SHORT_ANSWERS and spec.answer and spec.ground_truth
            if is_comparable and _bare(spec.answer) != _bare(spec.ground_truth):
                try:
                    responses[index] = gold_response(replace(spec, ground_truth=""), options=self._pool.options)
                except GoldError:
                    responses[index] = spec.answer
        verdicts = await self._pool.score(list(responses.values()), [specs[index] for index in responses])
        return {
            index: f"answer {specs[index].answer[:100]!r} is another than ground_truth {specs[index].ground_truth[:100]!r}, which "
            "alone is scored; make them agree or leave `answer` empty"
            for index, verdict in zip(responses, verdicts, strict=True)
            if verdict.status != "fault" and verdict.accuracy < GOLD_ACCURACY
        }

    def close(self) -> None:
        self._thread.submit(self._end).result()
        self._thread.shutdown()

    def _end(self) -> None:
        with self._runner as runner:
            runner.run(self._pool.close())


def _bare(answer: str) -> str:
    """Without what a gold answer may be wrapped in."""
    return _WRAPPING.sub("", answer).casefold()


def _gold_problem(sample: Sample) -> str | None:
    """What can be said of a gold answer without scoring it."""
    reward = sample.reward
    if reward.verifier == "ocr":
        text = reward.gold.strip().removeprefix(OPEN).removesuffix(CLOSE)
        for tag in TAGS:
            if tag in text:
                return f"the gold answer {reward.gold[:100]!r} holds {tag}, between or behind which answers are read; write it without"
    return box_problem(corners(reward))
