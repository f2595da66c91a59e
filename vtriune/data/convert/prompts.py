"""The words of converted rows: what is asked, and in what form answers are to be given."""

import json
from collections.abc import Sequence

from verifiers import RewardSpec
from vtriune.data.box_frames import Corners
from vtriune.data.schema import IMAGE_MARKER, Sample, Turn

_BOXES = (
    "Reason between <think> and </think> first, then give the boxes as JSON between <answer> and </answer>: "
    "<answer>[{{'bbox_2d': [x1, y1, x2, y2], 'label': '{label}'}}]</answer>."
)
_WORDS = "Reason between <think> and </think> first, then put the answer into \\boxed{} between <answer> and </answer>."
DETECT_ALL = "Detect all objects of these categories in the image: {names}. " + _BOXES
DETECT_LABEL = "Detect all instances of {label} in the image. " + _BOXES
GROUND = "Find {label} in the image: exactly one box. " + _BOXES
Labelled = tuple[str, Corners]


def boxes(
    question: str,
    golds: Sequence[Labelled],
    picture: bytes,
    size: tuple[int, int],
    frame: str,
    source: str,
    sample_id: str,
) -> Sample:
    """A row of the detection verifier. `golds` in px of the picture, of `size`; written in `frame`, original_px or norm_1000."""
    written = [{"bbox_2d": _in_frame(box, size, frame), "label": label} for label, box in golds]
    reward = RewardSpec(
        ground_truth=json.dumps(written), verifier="detection",
        verifier_parm={"gold_frame": frame, "det_reward_ratio": {"iou_max_label_first": 1.0, "iou_completeness": 0.3}},
    )  # fmt: skip
    return Sample(-1, source, [Turn("user", f"{IMAGE_MARKER}{question}")], [picture], reward, "detection", sample_id)


def _in_frame(box: Corners, size: tuple[int, int], frame: str) -> list[float]:
    """Pixels to the hundredth, or whole thousandths of the picture."""
    if frame == "original_px":
        return [round(value, 2) for value in box]
    return [round(1000 * value / size[axis % 2]) for axis, value in enumerate(box)]


def words(
    question: str, answer: str, verifier: str, picture: bytes, source: str, ability: str, sample_id: str
) -> Sample:
    """A row whose answer is a word or a number."""
    turn = Turn("user", f"{IMAGE_MARKER}{question} {_WORDS}")
    return Sample(-1, source, [turn], [picture], RewardSpec(ground_truth=answer, verifier=verifier), ability, sample_id)
