"""`rewards.*` as the reward library's own options. Called by the verifier pool and by checks of data."""

from verifiers import RewardOptions
from vtriune.config.tree import Rewards


def reward_options(rewards: Rewards, *, is_evaluation: bool = False) -> RewardOptions:
    """Training's options, or evaluation's: these have a fixed IoU threshold, so that figures of different steps compare.

    Raises verifiers.OptionsError for a value out of range.
    """
    return RewardOptions(
        iou_threshold=rewards.evaluation_threshold if is_evaluation else rewards.iou_threshold,
        iou_schedule=tuple((step.until, step.threshold) for step in rewards.iou_schedule),
        matching=rewards.matching,
        report=rewards.report,
        format=rewards.format,
        fold_case=rewards.fold_case,
        numeric_tolerance=rewards.numeric_tolerance,
        frame=rewards.frame,
        python_allow=tuple(rewards.python),
        max_response_chars=rewards.max_response_chars,
        deadline_s=rewards.deadline_s,
        correct_threshold=rewards.correct_threshold,
    )
