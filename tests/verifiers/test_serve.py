"""The library over HTTP: its own protocol, the released server's, and errors that are errors."""

import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from fastapi.testclient import TestClient

from verifiers import RewardOptions, RewardSpec, score
from verifiers.pool.pool import VerifierPool
from verifiers.serve import create_app

CAT = "[{'bbox_2d': [0, 0, 10, 10], 'label': 'cat'}]"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(VerifierPool(1, RewardOptions(deadline_s=2.0)), "secret")) as client:
        client.headers["authorization"] = "Bearer secret"
        yield client


def judged(client: TestClient, **fields: object) -> tuple[int, dict]:
    asked = {"response": r"\boxed{\frac{1}{2}}", "prompt": "", "answer": "0.5", "solution": "0.5", "data_source": "s"}
    asked |= {"reward_verifier": "mathverify", "reward_verifier_parm": "{}"} | fields
    reply = client.post("/judge", content=json.dumps(asked))
    return reply.status_code, reply.json()


def test_a_batch_is_scored_in_order(client: TestClient) -> None:
    specs = [
        {"ground_truth": "0.5"},
        {"ground_truth": CAT, "verifier": "detection", "verifier_parm": {"det_reward_ratio": {"map": 1}}},
    ]
    reply = client.post(
        "/score", json={"responses": [r"\boxed{\frac{1}{2}}", f"<answer>{CAT}</answer>"], "specs": specs}
    )
    verdicts = reply.json()["verdicts"]
    assert [verdict["accuracy"] for verdict in verdicts] == [1.0, 1.0]
    assert verdicts[1]["components"]["map75"] == 1.0


def test_sizes_of_images_come_with_the_request(client: TestClient) -> None:
    parm = {"det_verifier_normalized": True, "det_reward_ratio": {"map": 1}}
    asked = {
        "responses": ["<answer>[{'bbox_2d': [0, 0, 200, 200], 'label': 'cat'}]</answer>"] * 2,
        "specs": [{"ground_truth": CAT.replace("10, 10", "500, 500"), "verifier": "detection", "verifier_parm": parm}]
        * 2,
        "progress": None,
        "image_sizes": [[[[640, 480], [400, 400]]], [[[640, 480], [200, 200]]]],
    }
    verdicts = client.post("/score", json=asked).json()["verdicts"]
    assert [verdict["accuracy"] for verdict in verdicts] == [1.0, 0.0]
    reply = client.post("/score", json={**asked, "image_sizes": [[]]})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")
    without = client.post("/score", json={**asked, "image_sizes": None}).json()["verdicts"]
    assert {verdict["status"] for verdict in without} == {"fault"}


def test_a_fault_in_a_batch_has_null_scores(client: TestClient) -> None:
    verdict = client.post("/score", json={"responses": ["x"], "specs": [{"ground_truth": "?!"}]}).json()["verdicts"][0]
    assert (verdict["status"], verdict["reward"]) == ("fault", None)


def test_the_released_servers_request_gets_its_answer(client: TestClient) -> None:
    status, reply = judged(client)
    assert status == 200
    assert reply["rewards"] == {
        "format_reward": 0.0,
        "accuracy_reward": 1.0,
        "reflection_reward": 0.0,
        "final_reward": pytest.approx(1 / 1.1),
    }


def test_the_released_trainers_parameters_are_understood(client: TestClient) -> None:
    gold = "<answer>[{'bbox_2d': [100, 200, 300, 400], 'label': 'cat'}]</answer>"
    parm = {
        "is_training": True,
        "step": 5,
        "total_steps": 100,
        "image_grid_thw": [[1, 500, 1000]],
        "image_path": ["a.jpg"],
    }
    parm |= {
        "verifier_style": "rule",
        "det_verifier_normalized": True,
        "det_reward_ratio": {"iou_max_label_first": 1.0},
    }
    found = "<answer>[{'bbox_2d': [100, 100, 300, 220], 'label': 'cat'}]</answer>"
    fields = {"reward_verifier": "detection", "solution": gold, "response": found}
    status, early = judged(client, **fields, reward_verifier_parm=json.dumps(parm))
    assert status == 200
    assert early["rewards"]["accuracy_reward"] == pytest.approx(0.0)
    exact = "<answer>[{'bbox_2d': [100, 100, 300, 190], 'label': 'cat'}]</answer>"
    _, within = judged(client, **{**fields, "response": exact}, reward_verifier_parm=json.dumps(parm))
    _, late = judged(client, **{**fields, "response": exact}, reward_verifier_parm=json.dumps(parm | {"step": 90}))
    assert within["rewards"]["accuracy_reward"] == pytest.approx(0.9)
    assert late["rewards"]["accuracy_reward"] == 0.0


def test_an_evaluation_is_scored_as_by_the_library(client: TestClient) -> None:
    parm = {"det_reward_ratio": {"iou_max_label_first": 1.0}}
    spec = RewardSpec(ground_truth=CAT, verifier="detection", verifier_parm=parm)
    answer = "<answer>[{'bbox_2d': [0, 0, 10, 7], 'label': 'cat'}]</answer>"
    expected = score(answer, spec, None)
    asked = {"responses": [answer], "specs": [msgspec.to_builtins(spec)], "progress": None}
    assert client.post("/score", json=asked).json()["verdicts"] == [msgspec.to_builtins(expected)]
    released = {"reward_verifier": "detection", "solution": CAT, "response": answer}
    _, reply = judged(client, **released, reward_verifier_parm=json.dumps(parm | {"is_training": False}))
    assert reply["rewards"]["accuracy_reward"] == expected.accuracy == pytest.approx(0.7)
    assert reply["rewards"]["accuracy@average_reward"] == expected.components["accuracy@average"]


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"reward_verifier": "detecton"}, 422, "bad_row"),
        ({"reward_verifier_parm": "{"}, 400, "bad_request"),
        ({"reward_verifier_parm": '{"foldcase": true}'}, 422, "bad_row"),
        ({"solution": "?!"}, 422, "fault"),
        ({"solution": "", "answer": ""}, 422, "bad_row"),
        ({"response": r"\boxed{9^{9^{9^{9^{9}}}}}"}, 503, "fault"),
        ({"response": 7}, 400, "bad_request"),
    ],
)
def test_what_the_release_answered_with_zeros_is_a_typed_error(
    client: TestClient, fields: dict, status: int, kind: str
) -> None:
    code, reply = judged(client, **fields)
    assert (code, reply["error"]["type"]) == (status, kind), reply
    assert reply["error"]["message"]


def test_every_request_needs_the_token(client: TestClient) -> None:
    for token in ("", "Bearer wrong", "secret"):
        assert client.get("/health", headers={"authorization": token}).status_code == 401
    assert client.get("/health").json() == {"num_workers": 1}
    assert client.get("/metrics").json()["pool/num_samples"] > 0


def test_a_body_over_the_limit_is_refused(client: TestClient) -> None:
    reply = client.post("/score", content=b" " * (33 * 1024 * 1024))
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "too_large")


def test_another_address_than_loopback_needs_a_token() -> None:
    command = [sys.executable, "-m", "verifiers.serve", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin"}, cwd=".")
    assert done.returncode == 2
    assert "VERIFIERS_TOKEN" in done.stderr
