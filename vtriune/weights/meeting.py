"""Where learner rank 0 and the generators meet for a publish, and what they agree on. Torch only; used on both sides.

A publish has a control connection (`Meeting`, a TCPStore that learner rank 0 serves for this publish alone) and a data group
(`vtriune.weights.group`, gloo or NCCL, beside torch's default group, kept while its members stay the same):

    phase      member 0, the learner                        members 1, 2, …, generators
    meet       waits for all            ◀── arrive ──       "I hold data group g", or none
    agree      manifest, data group     ── proposal ──▶     match the manifest against their own model
               waits for all            ◀── consent ──
                                        ── go ──▶           nobody forms a group before all agreed
    transfer   broadcasts buckets       ═════════════▶      receive
    load       waits for all            ◀── receipt ──      loaded so many tensors, with this checksum

Every phase ends by the publish's deadline and errors name it. A member that fails says so in the store before it leaves
its groups: whoever waits for it, in the store or in a broadcast, gets that text as a PeerFailure. A member that died shows
as a lost connection, or at the deadline by its number. Nobody waits longer than the deadline.

Sockets listen on the given interface only, at a port the kernel chose. Neither TCPStore nor gloo authenticates: between hosts
this belongs on a private network.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Literal

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from vtriune.messages import Rendezvous, WeightManifest

Phase = Literal["meet", "agree", "gather", "transfer", "load"]

# A broken connection is told in our own errors; torch's C++ traces of the same event would hide them.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

FIRST_PAUSE_S, LAST_PAUSE_S = 0.0005, 0.02
_MAX_TEXT = 4000
_FAILURE_KEY = "failure"
_REPORT_TIME = timedelta(seconds=5)


class PublishFailure(RuntimeError):
    """A publish failed in `phase`."""

    def __init__(self, phase: Phase, text: str) -> None:
        super().__init__(f"publish failed in phase {phase}: {text}")
        self.phase = phase
        self.text = text


class PeerFailure(PublishFailure):
    """The cause lies with another member or the network; whoever raises it is unharmed and may take part in the next one."""

    kind = "bystander"


class _Late(PeerFailure):
    """The deadline passed while this member waited for another, which of the two is broken it cannot tell."""

    kind = "engine"


class Proposal(msgspec.Struct, frozen=True):
    """What member 0 answers to all arrivals."""

    group: str
    """Name of the data group to use; members that hold it keep it, otherwise all form it."""
    manifest: WeightManifest


class Receipt(msgspec.Struct, frozen=True):
    """What a receiver loaded."""

    num_tensors: int
    checksum: str


class _MemberFailure(msgspec.Struct, frozen=True):
    member: int
    phase: Phase
    text: str


class Deadline:
    """A moment after which nobody waits."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, 0 when none are."""
        return max(0.0, self._end - time.monotonic())

    @property
    def left(self) -> timedelta:
        """The same for torch, which takes at least a millisecond."""
        return timedelta(seconds=max(self.left_s, 0.001))


def listen(host: str, num_members: int, backend: Literal["gloo", "nccl"]) -> tuple[TCPStore, Rendezvous]:
    """Serve a store for one publish on `host`, an address of this machine, at a free port."""
    with socket.create_server((host, 0), backlog=num_members) as server:
        port = server.getsockname()[1]
        # Handed over open: TCPStore itself would listen on every interface.
        store = TCPStore(
            host, port, None, True, timedelta(seconds=60), wait_for_workers=False, master_listen_fd=server.detach()
        )
    return store, Rendezvous(host, port, num_members, backend)


def report_lost(rendezvous: Rendezvous, member: int, reason: str) -> None:
    """Say for a member that cannot that it failed: dead or frozen, it would be waited for until the deadline. Never raises."""
    try:
        store = store_at(rendezvous, _REPORT_TIME)
        failure = _MemberFailure(member, "agree", reason[:_MAX_TEXT])
        store.set(_FAILURE_KEY, msgspec.msgpack.encode(failure))  # type: ignore[arg-type]
    except dist.DistError:
        # Nobody serves it any more: the publish is over.
        pass


def held_as(name: str, member: int) -> str:
    """What a member announces to hold: a data group is of use only under the number it was formed with."""
    return f"{name}#{member}"


class Meeting:
    """One member's control connection of one publish. Used by one thread at a time."""

    def __init__(self, rendezvous: Rendezvous, member: int, deadline: Deadline, store: TCPStore | None = None) -> None:
        """Connect; member 0 hands in the store it serves. Raises PeerFailure when nobody listens there."""
        self.rendezvous = rendezvous
        self.member = member
        self.deadline = deadline
        try:
            self._store = store or store_at(rendezvous, deadline.left)
        except dist.DistError as error:
            raise PeerFailure(
                "meet", f"nobody serves {rendezvous.host}:{rendezvous.port} ({first_line(error)})"
            ) from error

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Tell the others when the body raises, and raise PublishFailure, or PeerFailure when another member failed first."""
        try:
            yield
        except Exception as error:
            # Whatever broke here, the others must learn of it before this member leaves the group.
            raise self.tell(phase, error) from error

    def arrive(self, holding: str) -> Proposal:
        """Receiver, phases meet and agree: say what this member holds (`held_as`, '' for nothing), get the proposal."""
        with self.phase("meet"):
            self._set(f"arrive/{self.member}", holding.encode())
        with self.phase("agree"):
            self._wait("agree", {"proposal": 0})
            return msgspec.msgpack.decode(self._store.get("proposal"), type=Proposal)

    def consent(self) -> None:
        """Receiver, end of phase agree: the manifest fits. Returns once it fits everyone."""
        with self.phase("agree"):
            self._set(f"consent/{self.member}", b"yes")
            self._wait("agree", {"go": 0})

    def deliver_receipt(self, receipt: Receipt) -> None:
        """Receiver, end of phase load."""
        with self.phase("load"):
            self._set(f"receipt/{self.member}", msgspec.msgpack.encode(receipt))

    def propose(self, holding: str, new_name: str, manifest: WeightManifest) -> str:
        """Sender, phases meet and agree: returns the data group's name once every member consented.

        The group named `holding` ('' for none) is kept when every member holds it under the same number; otherwise
        `new_name` is to be formed.
        """
        others = range(1, self.rendezvous.num_members)
        with self.phase("meet"):
            self._wait("meet", {f"arrive/{member}": member for member in others})
            is_kept = bool(holding) and all(
                self._store.get(f"arrive/{member}").decode() == held_as(holding, member) for member in others
            )
        name = holding if is_kept else new_name
        with self.phase("agree"):
            self._set("proposal", msgspec.msgpack.encode(Proposal(name, manifest)))
            self._wait("agree", {f"consent/{member}": member for member in others})
            self._set("go", b"yes")
        return name

    def collect_receipts(self, expected: Receipt) -> None:
        """Sender, phase load: every member loaded what was sent. Raises PublishFailure naming the first that did not."""
        others = range(1, self.rendezvous.num_members)
        with self.phase("load"):
            self._wait("load", {f"receipt/{member}": member for member in others})
            for member in others:
                receipt = msgspec.msgpack.decode(self._store.get(f"receipt/{member}"), type=Receipt)
                if receipt != expected:
                    raise PublishFailure(
                        "load",
                        f"member {member} loaded {receipt.num_tensors} tensors with checksum {receipt.checksum}; "
                        f"sent were {expected.num_tensors} with {expected.checksum}",
                    )

    def tell(self, phase: Phase, error: Exception) -> PublishFailure:
        """Let the others know that this member failed; returns what to raise here. Never raises."""
        try:
            if (earlier := self._failure(phase)) is not None:
                return earlier
            if self.member and isinstance(error, _Late):
                # The learner knows whom it waits for; "the learner is late" would hide that.
                return error
            text = error.text if isinstance(error, PublishFailure) else f"{type(error).__name__}: {error}"
            failure = _MemberFailure(self.member, phase, text[:_MAX_TEXT])
            self._store.set(_FAILURE_KEY, msgspec.msgpack.encode(failure))  # type: ignore[arg-type]
        except (dist.DistError, PeerFailure):
            # The store is gone with the learner: nobody is left to tell.
            pass
        return error if isinstance(error, PublishFailure) else PublishFailure(phase, f"{type(error).__name__}: {error}")

    def _wait(self, phase: Phase, keys: dict[str, int]) -> None:
        """Until all `keys` are set; a key's value is the member that sets it."""
        pause = FIRST_PAUSE_S
        while not self._check(phase, list(keys)):
            if (failure := self._failure(phase)) is not None:
                raise failure
            if not self.deadline.left_s:
                missing = sorted({member for key, member in keys.items() if not self._check(phase, [key])})
                named = ", ".join(map(str, missing)) or "0"
                raise _Late(phase, f"no word from member {named} within {self.deadline.seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    def _check(self, phase: Phase, keys: Sequence[str]) -> bool:
        with self._reaching(phase):
            return bool(self._store.check(list(keys))) if keys else True

    def _set(self, key: str, value: bytes) -> None:
        with self._reaching("meet"):
            self._store.set(key, value)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _reaching(self, phase: Phase) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            address = f"{self.rendezvous.host}:{self.rendezvous.port}"
            raise PeerFailure(phase, f"lost the learner, which serves {address} ({first_line(error)})") from error

    def _failure(self, phase: Phase) -> PeerFailure | None:
        """The failure another member reported, if any."""
        if not self._check(phase, [_FAILURE_KEY]):
            return None
        failure = msgspec.msgpack.decode(self._store.get(_FAILURE_KEY), type=_MemberFailure)
        if failure.member == self.member:
            return None
        return PeerFailure(failure.phase, f"member {failure.member}: {failure.text}")


def store_at(rendezvous: Rendezvous, patience: timedelta) -> TCPStore:
    """A client of the store that the learner serves. Raises DistError when nobody does."""
    return TCPStore(rendezvous.host, rendezvous.port, None, False, patience, wait_for_workers=False)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
