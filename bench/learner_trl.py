"""TRL's GRPOTrainer beside our learner, on the batches it generates for itself. Called by `bench.learner trl`.

64 completions of 64 tokens over 8 prompts with an image, a random 0.7 M-parameter Qwen2.5-VL, vision tower frozen on both
sides. TRL's optimisation part is its step without generation and scoring: forward, backward, clipping, AdamW. Ours includes
the vision tower on the batch's images, which the learner would otherwise take from its cache.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learner_steps import OurStep, PaddedStep, PromptData, Stopwatch, Workload
from vtriune.torchvision_schemas import define_missing_schemas

SIZE, TOKENS, GROUP = 64, 64, 8


def compare(rounds: int, token_budget: int) -> dict[str, Any]:
    """Seconds of each side per round, and the ratio of medians."""
    from bench.tiny_vlm import write_tiny_vlm

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_vlm(Path(folder))
        return _compare(Path(folder), rounds, token_budget)


def _compare(folder: Path, rounds: int, token_budget: int) -> dict[str, Any]:
    cpu = torch.device("cpu")
    ours = OurStep(folder, cpu, token_budget=token_budget)
    padded = PaddedStep(folder, cpu, token_budget=1 << 30)
    seconds: dict[str, list[float]] = {"ours": [], "padded": [], "trl": []}
    cpu_s: dict[str, list[float]] = {"ours": [], "padded": [], "trl": []}
    trainer = _trainer(folder, rounds + 2, SIZE)
    spent = {"generation": 0.0, "generation_cpu": 0.0, "start": 0.0, "start_cpu": 0.0}
    held: list[Workload] = []
    generate = trainer._generate_and_score_completions

    def timed(inputs: Any) -> Any:
        with Stopwatch(cpu) as watch:
            batch = generate(inputs)
        spent["generation"] += watch.times["seconds"]
        spent["generation_cpu"] += watch.times["cpu_s"]
        held.append(_workload(batch))
        return batch

    trainer._generate_and_score_completions = timed
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):  # type: ignore[misc]
        """After each of TRL's steps, ours on the same batch."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            spent.update(generation=0.0, generation_cpu=0.0, start=time.perf_counter(), start_cpu=time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["trl"].append(time.perf_counter() - spent["start"] - spent["generation"])
            cpu_s["trl"].append(time.process_time() - spent["start_cpu"] - spent["generation_cpu"])
            work = held.pop()
            for name, step in (("ours", ours), ("padded", padded)):
                measured = step(work)
                seconds[name].append(measured["seconds"])
                cpu_s[name].append(measured["cpu_s"])

    trainer.add_callback(InTurn())
    trainer.train()
    # The first two rounds warm both sides up.
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    used = {name: statistics.median(values[2:]) for name, values in cpu_s.items()}
    print(f"\n{SIZE} completions × {TOKENS} tokens, 0.7 M-parameter VLM, optimisation part only")
    for name, median in medians.items():
        times = f"{median:7.3f} s {median / medians['ours']:5.2f} ×  CPU time {used[name]:7.3f} s {used[name] / used['ours']:5.2f} ×"
        print(f"  {name:<14} {times}")
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "speedup": medians["trl"] / medians["ours"],
        "cpu_speedup": used["trl"] / used["ours"],
    }


def whole_steps(folder: Path, num_completions: int, steps: int) -> list[float]:
    """Seconds of each of TRL's steps, generation included, over the model in `folder`. Called by `bench.whole_step`."""
    define_missing_schemas()
    from transformers import TrainerCallback

    began, seconds = 0.0, []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - began)

    trainer = _trainer(folder, steps, num_completions)
    trainer.add_callback(Timer())
    trainer.train()
    return seconds


def _trainer(folder: Path, steps: int, num_completions: int) -> Any:
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(num_completions)]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "count the digits"}]}]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    model.generation_config.min_new_tokens = model.generation_config.max_new_tokens = TOKENS
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(rng.random()) for _ in completions],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=num_completions,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            max_steps=steps,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            temperature=1.0,
            learning_rate=1e-6,
            beta=0.0,
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": [turn] * num_completions, "image": images}),
        processing_class=AutoProcessor.from_pretrained(folder),
    )


def _workload(batch: dict[str, Any]) -> Workload:
    """TRL's tensors as groups: rows of a group follow each other and share prompt and image."""
    prompts, responses = [], []
    patches = batch["image_grid_thw"].prod(1).tolist()
    offsets = np.cumsum([0, *patches])
    for first in range(0, len(batch["prompt_ids"]), GROUP):
        ids = batch["prompt_ids"][first][batch["prompt_mask"][first].bool()].numpy()
        pixels = batch["pixel_values"][offsets[first] : offsets[first + 1]].numpy()
        prompts.append(PromptData(ids, pixels, batch["image_grid_thw"][first : first + 1].numpy()))
        rows = range(first, first + GROUP)
        # A random model draws pad ids as well, which our sampler would have blocked: an ordinary id costs the same.
        responses.append(
            [
                np.where(r < 8, 8, r)
                for r in (batch["completion_ids"][i][batch["completion_mask"][i].bool()].numpy() for i in rows)
            ]
        )
    return Workload(prompts, responses)
