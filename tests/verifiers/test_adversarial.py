"""No answer that games a verifier beats the honest one; none takes long; none raises. One case per line of cases/adversarial.jsonl."""

import json
import time
from pathlib import Path

import pytest

from verifiers import RewardOptions, RewardSpec, check_gold, score

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "adversarial.jsonl").read_text().splitlines()]
CAT, DOG = {"bbox_2d": [10, 20, 110, 120], "label": "cat"}, {"bbox_2d": [200, 200, 300, 300], "label": "dog"}
EVEN = {
    "iou_max_label_first": 1.0,
    "iou_max_iou_first": 1.0,
    "iou_completeness": 0.3,
    "map": 1.0,
    "map50": 1.0,
    "map75": 1.0,
}
GOLDS = {
    "detection": json.dumps([CAT, DOG]),
    "mathverify": "42",
    "multiple_choice": "B",
    "counting": "3",
    "ocr": "stop sign",
    "point": "[0, 0, 10, 10]",
    "polygon": "[[0, 0], [10, 0], [10, 10], [0, 10]]",
    "temporal": "[10, 20]",
    "json_fields": '{"name": "Ada", "age": 36}',
}
HONEST = {**GOLDS, "mathverify": "\\boxed{42}", "point": "[5, 5]"}
DETECTION_WEIGHTS = [
    EVEN,
    *({name: 1.0, "iou_completeness": c} for name in EVEN if name != "iou_completeness" for c in (0.0, 1.0)),
]
# Honest boxes are not perfect ones: these are a pixel off.
HONEST_BOXES = [{**CAT, "bbox_2d": [11, 21, 111, 121]}, {**DOG, "bbox_2d": [199, 201, 299, 301]}]


def spec_of(verifier: str, weights: dict[str, float]) -> RewardSpec:
    parm = {"det_reward_ratio": weights} if verifier == "detection" else None
    return RewardSpec(ground_truth=GOLDS[verifier], verifier=verifier, verifier_parm=parm)


def response_of(case: dict) -> str:
    """The case's response, or what its builder makes of the gold answer."""
    size = case.get("size", 0)
    grid = [
        {"bbox_2d": [x, y, x + 100, y + 100], "label": "cat"} for x in range(10, 1010, 10) for y in range(20, 1020, 10)
    ]
    both = [CAT, DOG]
    builders = {
        "grid_of_boxes": lambda: [*both, *grid][:size],
        "repeated_gold": lambda: both * size,
        "every_label": lambda: [{**item, "label": label} for item in both for label in ("cat", "dog")],
        "swapped_labels": lambda: [{**CAT, "label": "dog"}, {**DOG, "label": "cat"}],
        "one_more": lambda: [*both, {"bbox_2d": [400, 400, 500, 500], "label": "cat"}],
        "one_less": lambda: [CAT],
    }
    if "response" in case:
        return case["response"]
    if case["build"] in builders:
        return f"<think>\n</think>\n<answer>{json.dumps(builders[case['build']]())}</answer>"
    texts = {
        "nested_brackets": "<answer>" + "[" * size + "]" * size + "</answer>",
        "nested_objects": "<answer>" + '{"a":' * size + "1" + "}" * size + "</answer>",
        "nested_box": "\\boxed{" + "(" * size + "42" + ")" * size + "}",
        "nested_fractions": "\\boxed{" + "\\frac{1}{" * size + "2" + "}" * size + "}",
        "keys_only": "<answer>" + "{'bbox_2d':[" * size + "</answer>",
        "wound_ring": f"<answer>{json.dumps([[0, 0], [10, 0], [10, 10], [0, 10]] * size)}</answer>",
        "long_text": "<answer>" + "x" * size + "</answer>",
    }
    return texts[case["build"]]


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Load sympy and the kernels: what they take to load is not what an answer takes."""
    assert score(r"\boxed{\frac{84}{2}}", RewardSpec(ground_truth="42")).accuracy == 1.0
    assert check_gold(spec_of("detection", EVEN)) is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['verifier']}: {case['reason']}")
@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_no_adversarial_answer_beats_the_honest_one(case: dict, matching: str) -> None:
    options = RewardOptions(iou_threshold=0.75, matching=matching)
    response = response_of(case)
    for weights in DETECTION_WEIGHTS if case["verifier"] == "detection" else [EVEN]:
        spec = spec_of(case["verifier"], weights)
        honest = json.dumps(HONEST_BOXES) if case["verifier"] == "detection" else HONEST[case["verifier"]]
        right = score(f"<think>\n</think>\n<answer>\n{honest}\n</answer>", spec, options=options)
        started_s = time.monotonic()
        wrong = score(response, spec, options=options)
        assert time.monotonic() - started_s < 5.5
        assert right.status == "ok"
        assert wrong.status == "fault" or wrong.reward < right.reward, (wrong, right)


@pytest.mark.parametrize("verifier", GOLDS)
def test_the_perfect_answer_scores_one(verifier: str) -> None:
    assert check_gold(spec_of(verifier, EVEN)) is None
