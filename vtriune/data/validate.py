"""What makes a row unfit to train on: broken images, markers that don't match, prompts too long, rewards that can't be earned.

`build_store` asks `Checks.problems` for every batch of rows and adds file and row to each reason. It runs once per store, in a
single pass that scales with cores:

- images are verified on threads (Pillow's decoders release the GIL): PNG by its checksums without inflating, JPEG by decoding at
  an eighth of its size, which reads every byte and skips most of the arithmetic; other formats are decoded;
- gold answers are scored in child processes, each distinct one once;
- a prompt is tokenized only when its byte length could exceed the limit.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from PIL import Image

import verifiers
from verifiers import RewardOptions
from vtriune.data.gold_check import GoldChecker
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import IMAGE_MARKER, Sample


class Checks:
    """Every check of a row, as `build_store` applies them; `close` ends the helper processes, the next use starts new ones.

    preprocessor  measures prompts; None: length and image size are not checked
    options       how gold answers are scored; None: the reward library's defaults
    prompt_pool   count the longest sentences of the prompt pool into a mathverify prompt
    num_workers   threads for images and processes for gold answers; None: half the processors, 1 to 8
    """

    def __init__(
        self,
        preprocessor: Preprocessor | None = None,
        options: RewardOptions | None = None,
        prompt_pool: bool = False,
        num_workers: int | None = None,
    ) -> None:
        num_workers = num_workers or min(8, max(1, len(os.sched_getaffinity(0)) // 2))
        self._preprocessor = preprocessor
        self._options = options or RewardOptions()
        self._prompt_pool = prompt_pool
        self._num_workers = num_workers
        self._golds = GoldChecker(self._options, num_workers)

    @property
    def identity(self) -> str:
        """Hash of limits, tokenizer, reward options and the reward library's own code."""
        digest = hashlib.sha256(msgspec.json.encode(self._options))
        digest.update(f"{self._prompt_pool} {self._preprocessor.identity if self._preprocessor else ''}".encode())
        for path in sorted(Path(verifiers.__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def problems(self, samples: Sequence[Sample]) -> list[list[str]]:
        """Reasons why each sample cannot be trained on, in order; empty lists for good ones."""
        collect_golds = self._golds.begin([sample.reward for sample in samples])
        with ThreadPoolExecutor(max_workers=self._num_workers, thread_name_prefix="image-check") as threads:
            found = list(threads.map(_image_problems, samples))
        for reasons, sample in zip(found, samples, strict=True):
            # A broken image has no size to count tokens of: the prompt is measured once its images are sound.
            if not reasons:
                reasons += self._prompt_problems(sample)
        for reasons, gold in zip(found, collect_golds(), strict=True):
            reasons += [] if gold is None else [f"reward_model: {gold}"]
        return found

    def close(self) -> None:
        """End helper processes. Idempotent."""
        self._golds.close()

    def _prompt_problems(self, sample: Sample) -> list[str]:
        if self._preprocessor is not None:
            problem = self._preprocessor.length_problem(sample, self._prompt_pool)
            return [] if problem is None else [problem]
        num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in sample.prompt if turn.role == "user")
        if num_markers != len(sample.images):
            return [f"the prompt has {num_markers} {IMAGE_MARKER} markers for {len(sample.images)} images"]
        return []


def image_problem(data: bytes) -> str | None:
    """Why the encoded image cannot be decoded; None when it can."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.verify()
            else:
                image.draft("RGB", (image.width // 8, image.height // 8))
                image.load()
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files.
        return f"broken ({type(error).__name__}: {error})"
    return None


def _image_problems(sample: Sample) -> list[str]:
    found = ((index, image_problem(data)) for index, data in enumerate(sample.images))
    return [f"images[{index}] is {problem}" for index, problem in found if problem is not None]
