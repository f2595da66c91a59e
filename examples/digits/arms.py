"""The paper's comparisons in small: which runs, and which claim each decides. Pure data; `ablations` runs them."""

from typing import NamedTuple

from examples.digits.build import SOURCES

REASONING = tuple(SOURCES[task] for task in ("math", "puzzle", "chart", "science"))
PERCEPTION = tuple(SOURCES[task] for task in ("counting", "ocr", "grounding", "detection"))
BOXES = tuple(SOURCES[task] for task in ("grounding", "detection"))
_TRAIN = "examples/digits/data/train/"


def _only(tasks: tuple[str, ...]) -> tuple[str, ...]:
    files = ", ".join(f"{_TRAIN}train_{task}_*.parquet" for task in tasks)
    return (f"data.train=[{files}]",)


def _off_policy(staleness: int, *more: str) -> tuple[str, ...]:
    return ("policy.mode=off_policy", f"policy.max_staleness={staleness}", *more)


ARMS: dict[str, tuple[str, ...]] = {
    "shipped": (),
    "iou .50": ("rewards.iou_threshold=0.5",),
    "iou .99": ("rewards.iou_threshold=0.99",),
    "iou average": ("rewards.iou_threshold=average",),
    "iou paper": (
        "rewards.iou_schedule=[{until: 0.1, threshold: 0.85}, {until: 0.25, threshold: 0.95}, {until: 1.0, threshold: 0.99}]",
    ),
    "reasoning only": _only(("math", "puzzle", "chart", "science")),
    "perception only": _only(("counting", "ocr", "grounding", "detection")),
    "off-policy 2": _off_policy(2),
    "off-policy 8": _off_policy(8),
    "off-policy 8 uncorrected": _off_policy(8, "loss.correction=none"),
    "off-policy 0, 8 updates": _off_policy(0, "policy.update_batch=4"),
    "tower frozen": ("model.freeze=[vit]",),
    "language model frozen": ("model.freeze=[llm]",),
    "all trained": ("model.freeze=[]",),
    "rate × ¼": ("optimizer.lr=1.75e-5",),
    "rate × 4": ("optimizer.lr=2.8e-4",),
    "no prompt pool": ("data.prompt_pool=false",),
    "kl": ("loss.kl=k3", "loss.kl_weight=0.01"),
}
"""Name → overrides of `examples/digits.yaml`."""


class Claim(NamedTuple):
    """What the paper says (arXiv 2505.18129), as `better` − `worse` > 0 of one figure after training.

    measure   reward, or a held-out IoU, of `sources` at temperature 1; early: IoU@50 of training's answers, the mean of all versions
    """

    text: str
    better: str
    worse: str
    measure: str = "reward"
    sources: tuple[str, ...] = tuple(SOURCES.values())


class Ablation(NamedTuple):
    """Arms that are compared, how often each is run and how long."""

    arms: tuple[str, ...]
    claims: tuple[Claim, ...]
    num_seeds: int = 3
    num_versions: int = 60


_IOU95, _EARLY = "label_first_iou@95", "early"
ABLATIONS = {
    "dynamic_iou": Ablation(
        ("shipped", "iou .50", "iou .99", "iou average", "iou paper"),
        (
            Claim("Dynamic IoU makes tighter boxes than a fixed .50", "shipped", "iou .50", _IOU95, BOXES),
            Claim("Dynamic IoU learns faster than a fixed .99", "shipped", "iou .99", _EARLY, BOXES),
            Claim("Dynamic IoU makes tighter boxes than a fixed .99", "shipped", "iou .99", _IOU95, BOXES),
            Claim("This file's steps suit it better than the paper's", "shipped", "iou paper", _IOU95, BOXES),
            Claim(
                "Dynamic IoU makes tighter boxes than the average threshold", "shipped", "iou average", _IOU95, BOXES
            ),
        ),
    ),
    "tasks": Ablation(
        ("shipped", "reasoning only", "perception only"),
        (
            Claim(
                "Joint training helps reasoning over reasoning alone", "shipped", "reasoning only", sources=REASONING
            ),
            Claim(
                "Joint training helps perception over perception alone",
                "shipped",
                "perception only",
                sources=PERCEPTION,
            ),
            Claim("Reasoning alone leaves perception behind", "shipped", "reasoning only", sources=PERCEPTION),
            Claim("Perception alone leaves reasoning behind", "shipped", "perception only", sources=REASONING),
        ),
    ),
    "policy": Ablation(
        ("shipped", "off-policy 2", "off-policy 8", "off-policy 8 uncorrected", "off-policy 0, 8 updates"),
        (
            Claim(
                "On-policy ends above the paper's off-policy, 8 updates a batch", "shipped", "off-policy 0, 8 updates"
            ),
            Claim("On-policy ends above off-policy at staleness 2", "shipped", "off-policy 2"),
            Claim("On-policy ends above off-policy at staleness 8", "shipped", "off-policy 8"),
            Claim("At staleness 8 the correction helps", "off-policy 8", "off-policy 8 uncorrected"),
        ),
    ),
    "modules": Ablation(
        ("tower frozen", "language model frozen", "all trained"),
        (
            Claim("Training the language model beats training the tower", "tower frozen", "language model frozen"),
            Claim("Freezing the tower beats training everything", "tower frozen", "all trained"),
        ),
        num_seeds=1,
        num_versions=30,
    ),
    "learning_rate": Ablation(
        ("shipped", "rate × ¼", "rate × 4"),
        (
            Claim("A larger rate than the best loses", "shipped", "rate × 4"),
            Claim("A smaller rate than the best loses", "shipped", "rate × ¼"),
        ),
        num_seeds=1,
        num_versions=30,
    ),
    "prompt_pool": Ablation(
        ("shipped", "no prompt pool"),
        (Claim("The prompt pool helps", "shipped", "no prompt pool"),),
        num_seeds=1,
        num_versions=30,
    ),
    "kl": Ablation(
        ("shipped", "kl"),
        (Claim("Training without a KL term is at least as good", "shipped", "kl"),),
        num_seeds=1,
        num_versions=30,
    ),
}
"""The first three are the core; the others have one seed and half the versions, and are marked so in the report."""
