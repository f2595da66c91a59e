"""Record what TRL's GRPOTrainer computes on the tensors of `tests/learner/loss_cases.py`: `python -m tests.learner.record_trl_losses`.

TRL (extra `peers`) is too heavy to import in every test run; its values are kept in `tests/learner/trl_losses.json` instead.
"""

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from learner.batch.tokens import Tokens
from tests.learner.loss_cases import HIGH, LOW, MAX_TOKENS, tokens
from vtriune.torchvision_schemas import define_missing_schemas

NAMES = {"grpo": "dapo", "dr_grpo": "dr_grpo"}
"""Our loss → TRL's `loss_type` that divides by the same denominator."""
NUM_SEEDS = 4
TARGET = Path(__file__).with_name("trl_losses.json")


class _Lists(dict[str, list[float]]):
    """The trainer's metric lists, made on first use."""

    def __missing__(self, key: str) -> list[float]:
        self[key] = []
        return self[key]


def trl_loss(trainer_class: Any, loss_type: str, inputs: Tokens) -> Tensor:
    """`GRPOTrainer._compute_loss` on a padded batch; everything around the loss is a stand-in."""
    lengths = torch.bincount(inputs.trajectory)
    columns = torch.cat([torch.arange(length) for length in lengths])
    shape = (inputs.num_trajectories, int(lengths.max()))

    def padded(values: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=values.dtype).index_put((inputs.trajectory, columns), values)

    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        loss_type=loss_type,
        beta=0.0,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        max_completion_length=MAX_TOKENS,
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor),
        model=SimpleNamespace(training=True),
        _metrics={"train": _Lists(), "eval": _Lists()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            padded(inputs.logprobs), padded(torch.zeros_like(inputs.logprobs)), None
        ),
    )  # fmt: skip
    mask = padded(torch.ones_like(inputs.prox))
    firsts = torch.cumsum(lengths, 0) - lengths
    batch = {
        "prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(lengths), 1),
        "completion_ids": torch.zeros(shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": inputs.advantages[firsts],
        "old_per_token_logps": padded(inputs.prox),
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trainer._compute_loss(None, batch)
    return loss


def main() -> None:
    define_missing_schemas()
    from trl import GRPOTrainer

    losses: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for name, loss_type in NAMES.items():
        for seed in range(NUM_SEEDS):
            inputs = tokens(seed)
            loss = trl_loss(GRPOTrainer, loss_type, inputs)
            (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
            losses[name].append({"value": float(loss.detach()), "gradient": gradient.tolist()})
    TARGET.write_text(json.dumps({"trl": version("trl"), "losses": losses}) + "\n")
    print(f"recorded {NUM_SEEDS} cases per loss in {TARGET}")


if __name__ == "__main__":
    main()
