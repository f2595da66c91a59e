"""Supervised warm start of the micro model: `python -m examples.digits.warm_start`.

Three phases, each with a checkpoint of its own in `--work`, so that an interrupted run goes on where it was and a later phase can
be run again alone (delete its file): vision (what lies under each image token, and where), clean (right demonstrations; the tower is
frozen), noisy (demonstrations with a known share of mistakes and careless boxes, see NOISE). The result is written to
`examples/digits/model`.
"""

import argparse
import logging
import pathlib
import random
import socket

from examples.digits.micro_vlm import MODEL_FOLDER, SIZES, build, build_tokenizer, save
from verifiers import terminal

import numpy as np  # isort: skip
import torch  # isort: skip
import torch.distributed as dist  # isort: skip
import torch.multiprocessing as mp  # isort: skip
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from examples.digits.batches import Writer
from examples.digits.demonstrations import Hand, Noise
from examples.digits.language import Vocabulary, language_loss
from examples.digits.streams import scenes
from examples.digits.training import Phase
from examples.digits.vision import Heads, encode, owned, resized, tower_loss

log = logging.getLogger("warm_start")
# Tasks whose skill comes late are shown more often, in the order of TASKS.
TASK_WEIGHTS = (1.2, 1.0, 1.0, 0.8, 0.8, 0.5, 2.5, 2.0)
NOISE = Noise(
    wrong={"math": 0.35, "puzzle": 0.35, "chart": 0.3, "science": 0.35, "counting": 0.35, "ocr": 0.35},
    careless_thought=0.05,
    lost_tag=0.06,
    hand=Hand(careful=0.6, small=0.01, large=0.15),
)


def train_vision(model: Qwen2_5_VLForConditionalGeneration, arguments: argparse.Namespace) -> None:
    """The tower and its merger, in place."""
    visual, heads = model.model.visual, Heads(model.config.text_config.hidden_size)
    phase = Phase([visual, heads], arguments.work / "vision.pt", arguments.vision_steps, arguments.vision_rate)
    seed = f"{arguments.seed}/vision/{phase.step}/{dist.get_rank()}"
    stream, rng = scenes(seed, arguments.vision_batch), random.Random(seed)
    phase.run(lambda: tower_loss(visual, heads, [scene for scene, _, _ in next(stream)], rng))
    visual.requires_grad_(False)


def train_language(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    arguments: argparse.Namespace,
) -> None:
    """The language model, in place, on clean and then on noisy demonstrations."""
    vocabulary, heads = Vocabulary(model), Heads(model.config.text_config.hidden_size)
    if arguments.init is not None:
        vocabulary.read(model)
    modules = [model.model.language_model.layers, model.model.language_model.norm, vocabulary, heads]
    for name, noise in (("clean", Noise()), ("noisy", NOISE)):
        num_steps, rate = getattr(arguments, f"{name}_steps"), getattr(arguments, f"{name}_rate")
        phase = Phase(modules, arguments.work / f"{name}.pt", num_steps, rate)
        seed = f"{arguments.seed}/{name}/{phase.step}/{dist.get_rank()}"
        stream, rng = scenes(seed, arguments.batch, TASK_WEIGHTS), random.Random(seed)
        writer = Writer(tokenizer, noise, rng)

        def step() -> tuple[torch.Tensor, dict[str, float]]:
            asked = next(stream)  # noqa: B023 - the phase has ended before the next stream is made
            with torch.no_grad():
                features = encode(model.model.visual, np.stack([resized(scene, rng) for scene, _, _ in asked]))  # noqa: B023
            truth = [owned(scene) for scene, _, _ in asked]
            return language_loss(model, vocabulary, heads, features, writer.batch(asked), truth, noise.hand)  # noqa: B023

        phase.run(step)
    vocabulary.write(model)


def train_rank(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """Entry of one rank: all phases that are not finished yet; rank 0 writes the model folder."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=arguments.ranks)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = build(len(tokenizer), arguments.seed, SIZES[arguments.size])
    if arguments.init is not None:
        model.load_state_dict(
            Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.init, dtype=torch.float32).state_dict()
        )
    train_vision(model, arguments)
    train_language(model, tokenizer, arguments)
    if rank == 0:
        save(model, tokenizer, arguments.out)
        log.info("wrote %s", arguments.out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm-start the micro vision-language model.")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path(".work/warm_start"), help="folder of the checkpoints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=MODEL_FOLDER)
    parser.add_argument(
        "--init", type=pathlib.Path, help="a model folder to go on from; with --vision-steps 0 its tower stays"
    )
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="processes, each on --threads cores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--vision-batch", type=int, default=48, help="pictures of a batch on each rank")
    parser.add_argument("--vision-rate", type=float, default=2e-3, help="peak learning rate of the tower")
    parser.add_argument("--clean-steps", type=int, default=4000)
    parser.add_argument("--noisy-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=24, help="pictures of a batch of the language model on each rank")
    parser.add_argument("--clean-rate", type=float, default=1.5e-3, help="peak learning rate of the clean phase")
    parser.add_argument("--noisy-rate", type=float, default=5e-4, help="peak learning rate of the noisy phase")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_rank, (arguments, port), nprocs=arguments.ranks)


if __name__ == "__main__":
    terminal.open_output()
    main()
