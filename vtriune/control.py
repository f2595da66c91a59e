"""Talk to a running job: `python -m vtriune.control RUN status | checkpoint | stop | mode=… [max_staleness=…]`.

The run serves one socket in a folder of mode 0700 and writes its address and a fresh token to `<run>/control.json`, mode 0600:
whoever may read that file may steer the run. A request without the token is refused and counted.
"""

import argparse
import hmac
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import msgspec
import zmq
import zmq.asyncio

from vtriune.schedule import Stance

log = logging.getLogger(__name__)

FILE = "control.json"
MAX_REQUEST_BYTES = 4096
Command = Literal["status", "checkpoint", "stop", "switch"]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One command to a run."""

    token: str
    command: Command
    mode: Literal["on_policy", "off_policy"] | None = None
    max_staleness: int | None = None


class Reply(msgspec.Struct):
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
    def switch(self, wanted: Stance) -> None: ...
    def request_checkpoint(self) -> None: ...


class ControlServer:
    """Serves requests for one run until closed. Use as a context manager around `serve`."""

    def __init__(self, run: Steerable, run_folder: Path) -> None:
        self.num_refused = 0
        self._run = run
        self._file = run_folder / FILE
        self._folder = Path(tempfile.mkdtemp(prefix="vtriune-control-"))
        self._token = secrets.token_hex(16)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)

    def __enter__(self) -> "ControlServer":
        address = f"ipc://{self._folder}/socket"
        self._socket.bind(address)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(Address(address, self._token, os.getpid())))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def serve(self) -> None:
        """Waits for requests for ever; each is answered at once."""
        while True:
            frame = await self._socket.recv()
            await self._socket.send(msgspec.json.encode(self._answer(frame)))

    def _answer(self, frame: bytes) -> Reply:
        try:
            request = msgspec.json.decode(frame, type=Request)
        except msgspec.DecodeError as error:
            self.num_refused += 1
            return Reply(error=f"not a request: {error}")
        if not hmac.compare_digest(request.token, self._token):
            self.num_refused += 1
            log.warning("control: a request with a wrong token was refused (%d so far)", self.num_refused)
            return Reply(error="wrong token")
        if request.command == "switch":
            wanted = _stance(request)
            if isinstance(wanted, str):
                return Reply(error=wanted)
            self._run.switch(wanted)
        else:
            act: dict[str, Callable[[], object]] = {"stop": self._run.stop, "checkpoint": self._run.request_checkpoint}
            act.get(request.command, lambda: None)()
        return Reply(status=self._run.status())


def ask(run_folder: Path, command: Command, timeout_s: float = 10.0, **arguments: Any) -> Reply:
    """Send one command to the run in `run_folder`. Raises FileNotFoundError when none runs there, TimeoutError when it is mute."""
    path = run_folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run is going on in this folder")
    address = msgspec.json.decode(path.read_bytes(), type=Address)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address.address)
        socket.send(msgspec.json.encode(Request(address.token, command, **arguments)))
        if not socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"the run with pid {address.pid} did not answer within {timeout_s:.0f} s")
        return msgspec.json.decode(socket.recv(), type=Reply)


def _stance(request: Request) -> Stance | str:
    """The stance a request asks for, or what is wrong with it."""
    if request.mode is None:
        return "write mode=on_policy or mode=off_policy"
    bound = request.max_staleness if request.max_staleness is not None else (0 if request.mode == "on_policy" else 2)
    if bound < 0 or (request.mode == "on_policy" and bound):
        return f"{request.mode} with max_staleness {bound} is impossible"
    return Stance(request.mode, bound)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when the run did as asked, 1 when it refused or is not there, 2 for a wrong command."""
    parser = argparse.ArgumentParser(
        prog="python -m vtriune.control", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/digits")
    parser.add_argument(
        "words", nargs="+", metavar="command", help="status | checkpoint | stop | mode=off_policy [max_staleness=2]"
    )
    options = parser.parse_args(arguments)
    try:
        command, switch = _parse(options.words)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        reply = ask(options.run, command, **switch)
    except (FileNotFoundError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    if reply.error is not None:
        print(f"refused: {reply.error}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(reply.status), indent=2).decode())
    return 0


def _parse(words: list[str]) -> tuple[Command, dict[str, Any]]:
    if len(words) == 1 and words[0] in get_args(Command) and words[0] != "switch":
        return words[0], {}  # type: ignore[return-value]
    pairs = dict(word.partition("=")[::2] for word in words)
    if "mode" not in pairs or set(pairs) - {"mode", "max_staleness"} or not pairs.get("max_staleness", "0").isdigit():
        raise ValueError(
            f"cannot read {' '.join(words)!r}; write status, checkpoint, stop, or mode=off_policy max_staleness=2"
        )
    switch: dict[str, Any] = {"mode": pairs["mode"]}
    if "max_staleness" in pairs:
        switch["max_staleness"] = int(pairs["max_staleness"])
    return "switch", switch


if __name__ == "__main__":
    sys.exit(main())
