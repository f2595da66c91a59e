"""Supervised warm start of the micro model: `python -m examples.digits.warm_start`.

Three phases, each with a checkpoint of its own in `--work`, so that an interrupted run goes on where it was and a later phase can
be run again alone (delete its file): vision (name the content of a cell), clean (right demonstrations and dense reading exercises;
the tower is frozen), noisy (demonstrations with a known share of mistakes, see NOISE). Without a phase's steps it is left out.
The result is written to `examples/digits/model`.
"""

import argparse
import json
import logging
import math
import pathlib
import socket
import time

from examples.digits.micro_vlm import IMAGE_PAD_ID, MODEL_FOLDER, build, build_tokenizer, save

import torch  # isort: skip
import torch.distributed as dist  # isort: skip
import torch.multiprocessing as mp  # isort: skip
import torch.nn.functional as F  # isort: skip
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.digits.batches import PLACES, TRAITS, Batch, Mixture, RowStream
from examples.digits.demonstrations import Noise
from examples.digits.rendering import digit_pool
from examples.digits.scenes import TASKS
from examples.digits.vision import feature_table, train_vision

log = logging.getLogger("warm_start")
# Tasks whose skill comes late are shown more often, in the order of TASKS.
CLEAN = Mixture(Noise(), task_weights=(0.8, 0.8, 1.5, 0.3, 1.5, 0.3, 2.0, 2.0))
# Easy questions get answers without the box more often than not; sums and sequences get wrong answers. Tasks that the model
# has hardly learned by then stay clean.
NOISE = Noise(
    wrong={"math": 0.3, "puzzle": 0.3, "science": 0.1, "ocr": 0.15},
    unboxed={"math": 0.25, "puzzle": 0.25, "chart": 0.1, "science": 0.55, "counting": 0.2, "ocr": 0.55},
    careless_thought=0.05,
    lost_tag=0.08,
)
NOISY = Mixture(
    NOISE, task_weights=(1.0, 1.0, 1.5, 0.7, 1.5, 0.7, 2.0, 2.0), num_questions=3, num_exercises=1, cot_share=0.5
)
TRAIT_WEIGHT = 0.5
LOG_EVERY = 100
SAVE_EVERY_S = 60.0


class TraitHeads(torch.nn.Module):
    """Linear heads that teach the language model's middle layers to look; dropped after the warm start.

    Image tokens after half of the layers tell content, place and order of their cell; after one layer more, a digit named in a
    question tells where it is in the image and how often.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cells = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(TRAITS)))
        self.names = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, sum(PLACES)))

    def forward(self, states: tuple[torch.Tensor, ...], is_image: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the mean cross entropies of both; states: hidden states (B, L, width) before and after every layer."""
        middle = len(states) // 2
        loss = mean_cross_entropy(self.cells(states[middle][is_image]), TRAITS, batch.traits)
        if len(batch.named_at):
            named = states[middle + 1].flatten(0, 1)[batch.named_at]
            loss = loss + mean_cross_entropy(self.names(named), PLACES, batch.places)
        return loss


def mean_cross_entropy(logits: torch.Tensor, sizes: tuple[int, ...], targets: torch.Tensor) -> torch.Tensor:
    """Mean over the several classifications whose logits lie side by side; targets: (n, len(sizes))."""
    parts = logits.split(sizes, dim=1)
    return torch.stack([F.cross_entropy(part, targets[:, index]) for index, part in enumerate(parts)]).mean()


def losses_of(
    model: Qwen2_5_VLForConditionalGeneration, heads: TraitHeads, table: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token losses (n,) of the batch's response tokens and the heads' loss; image features come from the table."""
    language = model.model.language_model
    is_image = batch.ids == IMAGE_PAD_ID
    embeds = language.embed_tokens(batch.ids).masked_scatter(is_image[..., None], table[batch.cells])
    output = language(
        inputs_embeds=embeds,
        attention_mask={"full_attention": batch.mask},
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    hidden = output.last_hidden_state
    logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[batch.loss_at])
    return F.cross_entropy(logits, batch.targets, reduction="none"), heads(output.hidden_states, is_image, batch)


class Progress:
    """Means of the loss per task since the last line of the log."""

    def __init__(self, phase: str, num_steps: int, num_ranks: int):
        self.phase, self.num_steps, self.num_ranks = phase, num_steps, num_ranks
        self.started, self.num_seen = time.monotonic(), 0
        self.clear()

    def clear(self) -> None:
        """Forget the losses."""
        self.sums, self.counts = torch.zeros(len(TASKS) + 1), torch.zeros(len(TASKS) + 1)

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count one batch."""
        self.num_seen += batch.ids.numel() * self.num_ranks
        self.sums.index_add_(0, batch.groups, losses.detach())
        self.counts.index_add_(0, batch.groups, torch.ones_like(losses))

    def tell(self, step: int, trait_loss: float) -> None:
        """Write one line and forget."""
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        told = " ".join(f"{name}={mean:.3f}" for name, mean in zip([*TASKS, "reading"], means, strict=True))
        speed = self.num_seen / (time.monotonic() - self.started)
        log.info("%s %d/%d %.0f tok/s traits=%.3f %s", self.phase, step, self.num_steps, speed, trait_loss, told)
        self.clear()


class Trainer:
    """One phase of language-model training: AdamW, warm-up then cosine, a checkpoint every few minutes.

    Ranks draw different batches and average their gradients; all hold the same weights. The tower has no gradient.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        heads: TraitHeads,
        checkpoint: pathlib.Path,
        num_steps: int,
        peak_rate: float,
    ):
        self.model, self.heads, self.checkpoint = model, heads, checkpoint
        self.num_steps, self.peak_rate = num_steps, peak_rate
        trained = (model.model.language_model, model.lm_head, self.heads)
        self.parameters = [parameter for module in trained for parameter in module.parameters()]
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def write(self) -> None:
        """Replace the checkpoint in one rename; rank 0 only."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    def rate(self) -> float:
        """Learning rate of the current step: 100 steps of warm-up, cosine to a twentieth of the peak."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / self.num_steps)
        return self.peak_rate * min(1.0, (self.step + 1) / 100) * (0.05 + 0.95 * cosine)

    def average_gradients(self) -> None:
        """Mean of the gradients over the ranks."""
        if self.num_ranks == 1:
            return
        # A batch that names no digit leaves the heads for names without a gradient on that rank.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads]) / self.num_ranks
        dist.all_reduce(flat)
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def update(self, table: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """One optimiser step; the losses of this rank's response tokens and its trait loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        losses, trait_loss = losses_of(self.model, self.heads, table, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (losses.mean() + TRAIT_WEIGHT * trait_loss).backward()
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return losses, trait_loss.item()

    def run(self, stream: RowStream, table: torch.Tensor, seed: int, num_tokens: int) -> None:
        """Train from the current step to the last."""
        batches = stream.batches(f"{seed}/{self.checkpoint.stem}/{self.step}/{self.rank}", num_tokens)
        progress = Progress(self.checkpoint.stem, self.num_steps, self.num_ranks)
        last_saved = time.monotonic()
        while self.step < self.num_steps:
            batch = next(batches)
            losses, trait_loss = self.update(table, batch)
            progress.add(batch, losses)
            if self.step % LOG_EVERY == 0 or self.step == self.num_steps:
                progress.tell(self.step, trait_loss)
            if time.monotonic() - last_saved > SAVE_EVERY_S or self.step == self.num_steps:
                self.write()
                last_saved = time.monotonic()


def vision_phase(model: Qwen2_5_VLForConditionalGeneration, work: pathlib.Path, num_steps: int, seed: int) -> None:
    """Train the tower on rank 0, or load it when it is already there; it stays frozen from here on."""
    path = work / "vision.pt"
    if dist.get_rank() == 0 and not path.exists():
        pools = {split: digit_pool(split) for split in ("train", "test")}
        figures = train_vision(model.model.visual, pools, num_steps, seed)
        torch.save(model.model.visual.state_dict(), path)
        (work / "vision.json").write_text(json.dumps(figures))
    dist.barrier()
    model.model.visual.load_state_dict(torch.load(path, weights_only=True))
    model.model.visual.requires_grad_(False)


def load_or_make_table(model: Qwen2_5_VLForConditionalGeneration, path: pathlib.Path) -> torch.Tensor:
    """The feature table of the train split's cells; rank 0 makes it once."""
    if dist.get_rank() == 0 and not path.exists():
        torch.save(feature_table(model.model.visual, digit_pool("train")), path)
    dist.barrier()
    return torch.load(path, weights_only=True)


def train(arguments: argparse.Namespace) -> None:
    """All phases that are not finished yet, on this rank; rank 0 writes the model folder."""
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = build(len(tokenizer), arguments.seed)
    vision_phase(model, arguments.work, arguments.vision_steps, arguments.seed)
    table = load_or_make_table(model, arguments.work / "table.pt")
    phases = [
        ("clean", CLEAN, arguments.clean_steps, arguments.clean_rate),
        ("noisy", NOISY, arguments.noisy_steps, arguments.noisy_rate),
    ]
    heads = TraitHeads(model.config.text_config.hidden_size)
    for name, mixture, num_steps, rate in phases:
        if num_steps:
            trainer = Trainer(model, heads, arguments.work / f"{name}.pt", num_steps, rate)
            trainer.run(
                RowStream(tokenizer, digit_pool("train"), mixture), table, arguments.seed, arguments.batch_tokens
            )
    if dist.get_rank() == 0:
        save(model, tokenizer, arguments.out)
        log.info("wrote %s", arguments.out)


def train_rank(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """Entry of one rank."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=arguments.ranks)
    train(arguments)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Warm-start the micro vision-language model.")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path(".work/warm_start"), help="folder of the checkpoints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2, help="processes, each on --threads cores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vision-steps", type=int, default=900)
    parser.add_argument("--clean-steps", type=int, default=2000)
    parser.add_argument("--noisy-steps", type=int, default=500)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="padded tokens of a batch on each rank")
    parser.add_argument("--clean-rate", type=float, default=1.5e-3, help="peak learning rate of the clean phase")
    parser.add_argument("--noisy-rate", type=float, default=7e-4, help="peak learning rate of the noisy phase")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_rank, (arguments, port), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
