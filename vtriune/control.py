"""Talk to a running job: `python -m vtriune.control RUN status | checkpoint | stop | mode=… [max_staleness=…] | weight SOURCE VALUE`.

The run serves one socket in a folder of mode 0700 and writes its address and a fresh token to `<run>/control.json`, mode 0600:
whoever may read that file may steer the run. A request without the token is refused. Whatever comes in is answered, and ends nothing.
"""

import argparse
import asyncio
import hmac
import logging
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import msgspec
import psutil
import zmq
import zmq.asyncio

from verifiers import terminal
from vtriune.config import ConfigError
from vtriune.config.modes import bound_of
from vtriune.config.sections.mixture import SourceWeight
from vtriune.config.sections.section import CountOrZero, Mode
from vtriune.data.schema import DataError
from vtriune.run.schedule import ModeInForce
from vtriune.transport.folder import SocketFolder, socket_address

log = logging.getLogger(__name__)

FILE = "control.json"
MAX_REQUEST_BYTES = 4096
Command = Literal["status", "checkpoint", "stop", "switch", "weigh"]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One command to a run."""

    token: str
    command: Command
    mode: Mode | None = None
    max_staleness: CountOrZero | None = None
    source: str = ""
    weight: SourceWeight = 0.0


class ControlReply(msgspec.Struct):
    """What the run answers: `error` is None when it did as asked."""

    error: str | None = None
    status: dict[str, Any] | None = None


class Address(msgspec.Struct):
    """What `control.json` holds."""

    address: str
    token: str
    pid: int


class Steerable(Protocol):
    """What a request may do to a run."""

    def status(self) -> dict[str, Any]: ...
    def stop(self) -> None: ...
    def switch(self, wanted: ModeInForce) -> None: ...
    def request_checkpoint(self) -> None: ...
    def weigh(self, source: str, weight: float) -> None: ...


class ControlServer:
    """Serves requests for one run until closed. Use as a context manager around `serve`."""

    def __init__(self, run: Steerable, run_folder: Path) -> None:
        self._run = run
        self._file = run_folder / FILE
        self._folder = SocketFolder()
        self._token = secrets.token_hex(16)
        self._num_refused = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)

    def __enter__(self) -> "ControlServer":
        address = socket_address(self._folder.path, "control")
        self._socket.bind(address)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(Address(address, self._token, os.getpid())))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._file.unlink(missing_ok=True)
        self._folder.remove()

    async def serve(self) -> None:
        """Waits for requests for ever; each is answered at once."""
        while True:
            try:
                reply = self._reply(await self._socket.recv_multipart())
                if reply.error is not None:
                    self._refuse(reply.error)
                await self._socket.send(msgspec.json.encode(reply))
            except zmq.ZMQError as error:
                # A message without a request's frames is announced by the socket and then dropped by it: nothing is there to receive.
                self._refuse(f"not a request: {error}")
            # A flood of requests is received without ever waiting: the run's own work comes in between.
            await asyncio.sleep(0)

    def _refuse(self, why: str) -> None:
        self._num_refused += 1
        if (
            self._num_refused & (self._num_refused - 1) == 0
        ):  # The 1st, 2nd, 4th, 8th …: a flood must not fill the disk either.
            log.warning("control: %d requests refused so far, now: %s", self._num_refused, why)

    def _reply(self, frames: list[bytes]) -> ControlReply:
        if len(frames) != 1:
            return ControlReply(error=f"not a request: {len(frames)} frames, not one")
        try:
            return self._answer(frames[0])
        except Exception as error:
            # Any: who asks gets the error, and the run goes on.
            log.exception("control: a request failed")
            return ControlReply(error=f"the request failed: {type(error).__name__}; the run's log says more")

    def _answer(self, frame: bytes) -> ControlReply:
        try:
            request = msgspec.json.decode(frame, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return ControlReply(error=f"not a request: {error}")
        if not hmac.compare_digest(request.token.encode("utf-8", "surrogatepass"), self._token.encode()):
            return ControlReply(error="wrong token")
        if request.command == "switch":
            if request.mode is None:
                return ControlReply(error="write mode=on_policy or mode=off_policy")
            try:
                self._run.switch(ModeInForce(request.mode, bound_of(request.mode, request.max_staleness)))
            except ConfigError as error:
                return ControlReply(error=str(error))
        elif request.command == "weigh":
            try:
                self._run.weigh(request.source, request.weight)
            except DataError as error:
                return ControlReply(error=str(error))
        else:
            act: dict[str, Callable[[], object]] = {"stop": self._run.stop, "checkpoint": self._run.request_checkpoint}
            act.get(request.command, lambda: None)()
        return ControlReply(status={**self._run.status(), "refused_requests": self._num_refused})


def ask(run_folder: Path, command: Command, timeout_s: float = 10.0, **arguments: Any) -> ControlReply:
    """Send one command to the run in `run_folder`. Raises FileNotFoundError when none runs there, TimeoutError when it is
    mute, another OSError for a `control.json` that cannot be read."""
    path = run_folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run is going on in this folder")
    try:
        address = msgspec.json.decode(path.read_bytes(), type=Address)
    except msgspec.DecodeError as error:
        raise ConnectionError(f"{path} is damaged ({error}), so nobody can reach the run") from error
    if not psutil.pid_exists(address.pid):
        raise FileNotFoundError(
            f"{path}: the run with pid {address.pid} is gone, or runs on another machine: ask it there"
        )
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address.address)
        socket.send(msgspec.json.encode(Request(address.token, command, **arguments)))
        if not socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"the run with pid {address.pid} did not answer within {timeout_s:.0f} s")
        return msgspec.json.decode(socket.recv(), type=ControlReply)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the run did as asked, 1 when it refused or is not there, 2 for a wrong command."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m vtriune.control", description=__doc__, formatter_class=form)
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/digits")
    commands = "status | checkpoint | stop | mode=off_policy [max_staleness=2] | weight SOURCE VALUE"
    parser.add_argument("words", nargs="+", metavar="command", help=commands)
    options = parser.parse_args(arguments)
    try:
        command, switch = _parse(options.words)
        reply = ask(options.run, command, **switch)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    if reply.error is not None:
        print(f"refused: {reply.error}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(reply.status), indent=2).decode())
    return 0


def _parse(words: list[str]) -> tuple[Command, dict[str, Any]]:
    if len(words) == 1 and words[0] in get_args(Command) and words[0] not in ("switch", "weigh"):
        return words[0], {}  # type: ignore[return-value]
    if words[0] == "weight":
        return "weigh", _parse_weight(words[1:])
    pairs = dict(word.partition("=")[::2] for word in words)
    is_twice, unknown = len(pairs) < len(words), set(pairs) - {"mode", "max_staleness"}
    if "mode" not in pairs or is_twice or unknown or not pairs.get("max_staleness", "0").isdecimal():
        raise ValueError(
            f"cannot read {' '.join(words)!r}; write status, checkpoint, stop, mode=off_policy max_staleness=2, or weight SOURCE VALUE"
        )
    switch: dict[str, Any] = {"mode": pairs["mode"]}
    if "max_staleness" in pairs:
        switch["max_staleness"] = int(pairs["max_staleness"])
    return "switch", switch


def _parse_weight(words: list[str]) -> dict[str, Any]:
    try:
        source, value = words
        return {"source": source, "weight": msgspec.convert(float(value), SourceWeight)}
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(
            f"cannot read 'weight {' '.join(words)}'; write weight SOURCE VALUE, a number from 0 to 1e6"
        ) from error


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())
