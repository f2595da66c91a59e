"""The reward library over HTTP, for trainers that are not ours: `python -m verifiers.serve --port 8000 --workers 4`.

    POST /score   {"responses": […], "specs": [{…}], "progress": 0.5, "sources": […], "image_sizes": […]} → {"verdicts": [{…}]}
    POST /judge   the released V-Triune server's request → its answer; what it answered with zeros is an error here
    GET  /metrics flat figures                              GET /health

Errors have one form, {"error": {"type", "message"}}: 400 for a request that cannot be read, 401 without the token, 413 over the size
limit, 422 `bad_row` for a row or gold answer that cannot be used, 503 `fault` where a verifier could not judge. A fault inside
/score is a verdict with status `fault` and null scores. Loopback only, unless a token is given.
"""

import argparse
import hmac
import ipaddress
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import Depends, FastAPI, Request, Response

from verifiers import terminal
from verifiers.pool.breaker import FaultRateError
from verifiers.pool.lanes import LanesError
from verifiers.pool.pool import VerifierPool
from verifiers.scoring import BAD_ROW, spec_from_row, validate_spec
from verifiers.types import ImageSize, RewardOptions, RewardSpec, Verdict

MAX_BODY_BYTES = 32 * 1024 * 1024
TOKEN_VARIABLE = "VERIFIERS_TOKEN"


class ScoreRequest(msgspec.Struct, frozen=True):
    """A batch; `progress` null means evaluation. `image_sizes`: of each response's prompt a list of its images' sizes, each
    [[width, height] in the data, [width, height] as the model saw it]."""

    responses: list[str]
    specs: list[RewardSpec]
    progress: float | None = 1.0
    sources: list[str] | None = None
    image_sizes: list[list[ImageSize]] | None = None


class JudgeRequest(msgspec.Struct, frozen=True):
    """The released server's request: one response; `solution` is the gold answer, `reward_verifier_parm` JSON in a string."""

    response: str
    answer: str
    solution: str
    data_source: str
    reward_verifier: str
    reward_verifier_parm: str
    prompt: str = ""
    format_ratio: float | None = None
    accuracy_ratio: float | None = None


class ReleasedParms(msgspec.Struct, frozen=True):
    """What the released trainer puts into `reward_verifier_parm` besides the row's own parameters."""

    is_training: bool = True
    step: float = 1.0
    total_steps: float = 1.0
    image_grid_thw: list[tuple[int, int, int]] | None = None
    image_path: Any = None


class RequestError(Exception):
    """A request that is answered with an error: status code, type, message."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def _answer(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


async def _body(request: Request, kind: type[msgspec.Struct]) -> Any:
    """The request's body as a struct; at most MAX_BODY_BYTES of it are held."""
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MAX_BODY_BYTES:
            raise RequestError(413, "too_large", f"a body over {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(bytes(parts), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(400, "bad_request", str(error)) from error


def released_request(asked: JudgeRequest) -> tuple[RewardSpec, float | None]:
    """The spec and progress of a released request: its training step is our progress, its image grid the resized image's size."""
    given = asked.reward_verifier_parm or "{}"
    try:
        extra = msgspec.json.decode(given, type=ReleasedParms)
        parms = msgspec.json.decode(given, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise RequestError(400, "bad_request", f"reward_verifier_parm: {error}") from error
    kept = {name: value for name, value in parms.items() if name not in ReleasedParms.__struct_fields__}
    if extra.image_grid_thw and parms.get("det_verifier_normalized"):
        _, height, width = extra.image_grid_thw[0]
        kept["resized_size"] = [width, height]
    row = {
        "answer": asked.answer,
        "ground_truth": asked.solution,
        "accuracy_ratio": asked.accuracy_ratio,
        "format_ratio": asked.format_ratio,
        "verifier": asked.reward_verifier,
        "verifier_parm": kept,
    }
    progress = min(1.0, extra.step / extra.total_steps) if extra.is_training and extra.total_steps > 0 else None
    return spec_from_row(row), progress


def released_answer(verdict: Verdict) -> dict[str, dict[str, float]]:
    """A verdict in the released server's form, every component under its name and `_reward`."""
    rewards = {f"{name}_reward": value for name, value in verdict.components.items()}
    rewards |= {"format_reward": verdict.format, "accuracy_reward": verdict.accuracy}
    return {"rewards": rewards | {"reflection_reward": 0.0, "final_reward": verdict.reward}}


def create_app(pool: VerifierPool, token: str | None = None) -> FastAPI:
    """The application; it starts the pool and closes it. With a token every request must carry `Authorization: Bearer <token>`."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()

    async def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RequestError(401, "unauthorized", "a bearer token is required")

    app = FastAPI(lifespan=lifespan, dependencies=[Depends(authorize)], openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> Response:
        return _answer({"error": {"type": error.kind, "message": str(error)}}, error.status)

    async def verdicts(
        responses: list[str],
        specs: list[RewardSpec],
        progress: float | None,
        sources: list[str],
        image_sizes: list[list[ImageSize]] | None = None,
    ) -> list[Verdict]:
        try:
            return await pool.score(responses, specs, progress, sources, image_sizes)
        except (FaultRateError, LanesError) as error:
            raise RequestError(503, type(error).__name__, str(error)) from error

    @app.post("/score")
    async def score(request: Request) -> Response:
        asked: ScoreRequest = await _body(request, ScoreRequest)
        sources = asked.sources or [""] * len(asked.responses)
        sizes = asked.image_sizes or [[]] * len(asked.responses)
        if not len(asked.responses) == len(asked.specs) == len(sources) == len(sizes):
            raise RequestError(400, "bad_request", "responses, specs, sources and image_sizes differ in length")
        return _answer({"verdicts": await verdicts(asked.responses, asked.specs, asked.progress, sources, sizes)})

    @app.post("/judge")
    async def judge(request: Request) -> Response:
        asked: JudgeRequest = await _body(request, JudgeRequest)
        spec, progress = released_request(asked)
        problem = validate_spec(spec, options=pool.options)
        if problem is not None:
            raise RequestError(422, "bad_row", problem)
        (verdict,) = await verdicts([asked.response], [spec], progress, [asked.data_source])
        if verdict.status == "fault":
            raise RequestError(422 if verdict.reason.startswith(BAD_ROW) else 503, "fault", verdict.reason)
        return _answer(released_answer(verdict))

    @app.get("/metrics")
    async def metrics() -> Response:
        return _answer(pool.metrics())

    @app.get("/health")
    async def health() -> Response:
        return _answer({"num_workers": len(pool.worker_pids)})

    return app


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--options", default="{}", help="rewards.* options as a JSON object")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1")
    token = os.environ.get(TOKEN_VARIABLE)
    is_loopback = arguments.host == "localhost" or ipaddress.ip_address(arguments.host).is_loopback
    if token is None and not is_loopback:
        parser.error(
            f"{arguments.host} is reachable from other machines: set {TOKEN_VARIABLE} to a secret that clients must send"
        )
    try:
        options = msgspec.json.decode(arguments.options, type=RewardOptions)
    except (msgspec.DecodeError, ValueError) as error:
        parser.error(f"--options: {error}")
    app = create_app(VerifierPool(arguments.workers, options), token)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    terminal.open_output()
    main()
