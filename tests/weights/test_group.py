"""Publishes between members that are threads of this process: every phase, and every way a member can fail."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from vtriune.messages import Rendezvous, WeightEntry, WeightManifest
from vtriune.weights.group import WeightGroup
from vtriune.weights.meeting import (
    Deadline,
    Meeting,
    PeerFailure,
    PublishFailure,
    Receipt,
    held_as,
    listen,
    report_lost,
)

MANIFEST = WeightManifest(3, [WeightEntry("w", [4], "float32")])
RECEIPT = Receipt(1, "abc")
CPU = torch.device("cpu")
SOON_S = 1.5


class Party:
    """A sender and receivers, each in a thread; `held` keeps every member's data group between publishes."""

    def __init__(self, num_members: int) -> None:
        self.num_members = num_members
        self.held: dict[int, WeightGroup] = {}
        self.formed: list[str] = []
        self._number = 0

    def publish(
        self,
        faults: dict[int, Callable[[str], Any]] | None = None,
        *,
        deadline_s: float = 10.0,
        absent: tuple[int, ...] = (),
    ) -> dict[int, Any]:
        """Outcome by member: the bytes it holds in the end, or its exception. A fault is called with each phase it enters."""
        self._number += 1
        store, rendezvous = listen("127.0.0.1", self.num_members, "gloo")
        faults = faults or {}
        silent: Callable[[str], Any] = lambda phase: None  # noqa: E731
        with ThreadPoolExecutor(self.num_members) as pool:
            running: dict[int, Future[Any]] = {
                0: pool.submit(self._send, store, rendezvous, deadline_s, faults.get(0, silent))
            }
            for member in range(1, self.num_members):
                if member not in absent:
                    running[member] = pool.submit(
                        self._receive, rendezvous, member, deadline_s, faults.get(member, silent)
                    )
            return {member: future.exception() or future.result() for member, future in running.items()}

    def _group(
        self, name: str, rendezvous: Rendezvous, member: int, deadline: Deadline, store: Any = None
    ) -> WeightGroup:
        held = self.held.pop(member, None)
        if held is None or (held.name, held.member) != (name, member):
            held = WeightGroup(rendezvous, name, member, deadline, CPU, store)
        self.held[member] = held
        return held

    def _send(self, store: Any, rendezvous: Rendezvous, deadline_s: float, fault: Callable[[str], Any]) -> Any:
        deadline = Deadline(deadline_s)
        meeting = Meeting(rendezvous, 0, deadline, store)
        try:
            fault("meet")
            holding = self.held[0].name if 0 in self.held else ""
            name = meeting.propose(holding, f"g{self._number}", MANIFEST)
            self.formed.append(name)
            group = self._group(name, rendezvous, 0, deadline, store)
            fault("transfer")
            buffer = torch.full((16,), self._number, dtype=torch.uint8)
            group.broadcast(buffer, deadline)
            meeting.collect_receipts(RECEIPT)
        except Exception as error:
            cause = meeting.tell("transfer", error)
            self._leave(0)
            raise cause from error
        return buffer.tolist()

    def _receive(self, rendezvous: Rendezvous, member: int, deadline_s: float, fault: Callable[[str], Any]) -> Any:
        deadline = Deadline(deadline_s)
        meeting = Meeting(rendezvous, member, deadline)
        try:
            held = self.held.get(member)
            proposal = meeting.arrive(held_as(held.name, held.member) if held else "")
            with meeting.phase("agree"):
                fault("agree")
            meeting.consent()
            with meeting.phase("transfer"):
                group = self._group(proposal.group, rendezvous, member, deadline)
                fault("transfer")
                buffer = torch.zeros(16, dtype=torch.uint8)
                group.broadcast(buffer, deadline)
            with meeting.phase("load"):
                meeting.deliver_receipt(fault("load") or RECEIPT)
        except Exception:
            self._leave(member)
            raise
        return buffer.tolist()

    def _leave(self, member: int) -> None:
        held = self.held.pop(member, None)
        if held is not None:
            held.close()


def raises(phase: str, error: Exception) -> Callable[[str], Any]:
    def fault(entered: str) -> None:
        if entered == phase:
            raise error

    return fault


def test_everyone_gets_the_bytes_and_the_group_is_kept_while_its_members_stay() -> None:
    party = Party(3)
    for number in (1, 2, 3):
        assert party.publish() == dict.fromkeys(range(3), [number] * 16)
    assert party.formed == ["g1", "g1", "g1"]


def test_a_member_that_comes_back_empty_handed_makes_all_form_a_new_group() -> None:
    party = Party(3)
    party.publish()
    party.held.pop(2).close()
    assert party.publish() == dict.fromkeys(range(3), [2] * 16)
    assert party.formed == ["g1", "g2"]


def test_members_that_changed_places_form_a_new_group() -> None:
    party = Party(3)
    party.publish()
    party.held[1], party.held[2] = party.held[2], party.held[1]
    assert party.publish() == dict.fromkeys(range(3), [2] * 16)
    assert party.formed == ["g1", "g2"]


def test_a_member_that_never_comes_is_named_to_everyone_at_the_deadline() -> None:
    start = time.monotonic()
    outcome = Party(3).publish(deadline_s=0.6, absent=(2,))
    assert time.monotonic() - start < 0.6 + SOON_S
    assert isinstance(outcome[0], PeerFailure)
    assert outcome[0].phase == "meet"
    assert "no word from member 2 within 0.6 s" in str(outcome[0])
    assert isinstance(outcome[1], PeerFailure)


@pytest.mark.parametrize("phase", ["agree", "transfer", "load"])
def test_a_receivers_own_error_is_shown_at_the_sender_and_at_the_others_at_once(phase: str) -> None:
    start = time.monotonic()
    outcome = Party(3).publish({2: raises(phase, MemoryError("no room for w"))})
    assert time.monotonic() - start < SOON_S
    assert isinstance(outcome[2], PublishFailure)
    assert not isinstance(outcome[2], PeerFailure)
    assert outcome[2].phase == phase
    assert isinstance(outcome[0], PeerFailure)
    assert "member 2: MemoryError: no room for w" in str(outcome[0])
    if phase == "agree":
        assert isinstance(outcome[1], PeerFailure)
    else:
        # What it needs may have reached it before: then it is done, and the sender alone learns of the failure.
        assert outcome[1] == [1] * 16 or isinstance(outcome[1], PeerFailure)


def test_the_senders_error_reaches_every_receiver() -> None:
    start = time.monotonic()
    outcome = Party(3).publish({0: raises("transfer", RuntimeError("the gather broke"))})
    assert time.monotonic() - start < SOON_S
    for member in (1, 2):
        assert isinstance(outcome[member], PeerFailure)
        assert "member 0: RuntimeError: the gather broke" in str(outcome[member])


def test_a_member_that_hangs_costs_the_others_no_more_than_the_deadline() -> None:
    released = threading.Event()
    start = time.monotonic()

    def hang(phase: str) -> None:
        if phase == "transfer":
            released.wait(5)

    party = Party(2)
    timer = threading.Timer(1.2, released.set)
    timer.start()
    outcome = party.publish({0: hang}, deadline_s=0.8)
    assert time.monotonic() - start < 0.8 + SOON_S
    assert isinstance(outcome[1], PublishFailure)
    assert outcome[1].phase == "transfer"
    timer.join()


def test_a_receipt_that_differs_names_the_member_and_both_checksums() -> None:
    outcome = Party(2).publish({1: lambda phase: Receipt(1, "xyz") if phase == "load" else None})
    assert "member 1 loaded 1 tensors with checksum xyz; sent were 1 with abc" in str(outcome[0])


def test_after_a_failure_the_same_members_publish_again() -> None:
    party = Party(3)
    party.publish({1: raises("transfer", OSError("cable"))})
    assert party.publish() == dict.fromkeys(range(3), [2] * 16)


def test_a_store_that_is_gone_is_an_error_within_the_deadline() -> None:
    store, rendezvous = listen("127.0.0.1", 2, "gloo")
    del store
    start = time.monotonic()
    with pytest.raises(PeerFailure, match="nobody serves"):
        Meeting(rendezvous, 1, Deadline(0.5))
    # torch tries once more before it looks at the clock.
    assert time.monotonic() - start < 5


def test_the_store_listens_on_the_given_interface_only() -> None:
    store, rendezvous = listen("127.0.0.1", 2, "gloo")
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == rendezvous.port}
    assert listening == {"127.0.0.1"}
    assert rendezvous.port != 0
    del store


def test_a_member_reported_lost_is_waited_for_no_longer() -> None:
    store, rendezvous = listen("127.0.0.1", 2, "gloo")
    reporter = threading.Timer(0.2, report_lost, (rendezvous, 1, "generator-0 rank 0 is frozen"))
    start = time.monotonic()
    reporter.start()
    with pytest.raises(PeerFailure, match="member 1: generator-0 rank 0 is frozen"):
        Meeting(rendezvous, 0, Deadline(60.0), store).propose("", "g1", MANIFEST)
    assert time.monotonic() - start < SOON_S
    reporter.join()
    del store
    report_lost(rendezvous, 1, "nobody listens any more, which harms nobody")
