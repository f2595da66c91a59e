"""Two FSDP2 ranks send, this process receives: every tensor whole and bit for bit, and nobody left waiting when one fails."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from learner import publishing
from learner.publishing import WeightSender
from vtriune.messages import PublishOrder, PublishReport, WeightManifest
from vtriune.weights.group import WeightGroup
from vtriune.weights.layout import Checksum, buckets_of, view_of
from vtriune.weights.meeting import Deadline, Meeting, PeerFailure, PublishFailure, Receipt

BUCKET_BYTES = 400
"""So small that the model below takes several buckets and one tensor is larger than a bucket."""


class TiedNet(nn.Module):
    """A frozen tower, blocks, an output layer tied to the embedding, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.visual = nn.Linear(5, 7)
        self.embed = nn.Embedding(23, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.lm_head = nn.Linear(6, 23, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))


def trainable(name: str) -> bool:
    # As `named_parameters()` has it: the tied output layer goes by the embedding's name.
    return not name.startswith("visual") and name != "lm_head.weight"


def small_buckets(entries: Any) -> Any:
    return buckets_of(entries, BUCKET_BYTES)


def run_rank(rank: int, num_ranks: int, folder: str, commands: Connection) -> None:
    """A learner rank that does what it is told until told to stop."""
    torch.set_num_threads(1)
    publishing.buckets_of = small_buckets  # type: ignore[assignment]
    publishing._GRACE_S = 2.0
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=num_ranks)
    model = TiedNet()
    mesh = init_device_mesh("cpu", (num_ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    senders = {None: WeightSender(model, trainable), "bfloat16": WeightSender(model, trainable, dtype=torch.bfloat16)}
    whole = publishing.gathered
    while True:
        command, argument, dtype = commands.recv()
        sender = senders[dtype]
        if command == "stop":
            break
        if command == "open":
            commands.send(sender.open_rendezvous(argument))
        elif command == "break_gather":
            publishing.gathered = _broken
        elif command == "mend":
            publishing.gathered = whole
        elif command == "manifest":
            commands.send([sender._entry(name, tensor) for name, tensor in sender._tensors(argument).items()])
        elif command == "update":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(argument)
        elif command == "send":
            try:
                commands.send(sender.send(argument, rank))
            except PublishFailure as error:
                commands.send(error.args[0] if not isinstance(error, PeerFailure) else f"peer: {error}")
    for sender in senders.values():
        sender.close()
    dist.destroy_process_group()


def _broken(tensor: torch.Tensor) -> torch.Tensor:
    raise OSError("a shard cannot be read")


class Ranks:
    """Two sending processes."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(2)]
        self.ends = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=run_rank, args=(rank, 2, str(folder), theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def tell(self, rank: int, command: str, argument: Any = None, dtype: str | None = None) -> None:
        self.ends[rank].send((command, argument, dtype))

    def ask(self, rank: int, command: str, argument: Any = None, dtype: str | None = None) -> Any:
        self.tell(rank, command, argument, dtype)
        return self.answer(rank)

    def answer(self, rank: int) -> Any:
        assert self.ends[rank].poll(120), f"rank {rank} does not answer"
        return self.ends[rank].recv()

    def publish(self, *, full: bool, dtype: str | None = None, deadline_s: float = 10.0, die: bool = False) -> Any:
        """(both ranks' answers, what the receiver got or raised)"""
        order = PublishOrder(4, self.ask(0, "open", 2, dtype), full, deadline_s)
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(receive, msgspec.structs.replace(order, member=1), die=die)
            for rank in (0, 1):
                self.tell(rank, "send", order, dtype)
            answers = [self.answer(rank) for rank in (0, 1)]
            return answers, receiving.exception() or receiving.result()

    def close(self) -> None:
        for rank in (0, 1):
            self.tell(rank, "stop")
        for process in self.processes:
            process.join(20)
            assert process.exitcode == 0


def receive(order: PublishOrder, *, die: bool = False) -> tuple[WeightManifest, dict[str, torch.Tensor]]:
    """A receiver without an engine; with `die` it leaves after it has agreed."""
    deadline = Deadline(order.deadline_s)
    meeting = Meeting(order.rendezvous, order.member, deadline)
    proposal = meeting.arrive("")
    meeting.consent()
    checksum, tensors = Checksum(), {}
    with meeting.phase("transfer"):
        group = WeightGroup(order.rendezvous, proposal.group, order.member, deadline, torch.device("cpu"))
        if die:
            group.close()
            del group, meeting
            raise KeyboardInterrupt
        for bucket in buckets_of(proposal.manifest.entries, BUCKET_BYTES):
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            group.broadcast(buffer, deadline)
            for slot in bucket.slots:
                tensors[slot.entry.name] = view_of(buffer, slot).clone()
                checksum.add(slot.entry, tensors[slot.entry.name])
    meeting.deliver_receipt(Receipt(checksum.num_tensors, checksum.hexdigest()))
    group.close()
    return proposal.manifest, tensors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def test_a_full_publish_carries_every_tensor_of_the_state_dict_bit_for_bit_the_tied_one_too(ranks: Ranks) -> None:
    answers, (manifest, tensors) = ranks.publish(full=True)
    expected = TiedNet().state_dict()
    assert list(tensors) == list(expected) == [entry.name for entry in manifest.entries]
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert torch.equal(tensors["lm_head.weight"], tensors["embed.weight"])
    assert isinstance(answers[0], PublishReport)
    assert (answers[0].version, answers[0].num_tensors) == (4, len(expected))
    assert answers[0].num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())


def test_later_publishes_carry_what_is_trained_and_the_alias_of_what_is_trained(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.tell(rank, "update", 2.0)
    _, (_, tensors) = ranks.publish(full=False)
    expected = {name: tensor * 2.0 for name, tensor in TiedNet().state_dict().items()}
    assert set(tensors) == {name for name in expected if trainable(name) and name != "scale"} | {"lm_head.weight"}
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    for rank in (0, 1):
        ranks.tell(rank, "update", 0.5)


def test_tensors_are_sent_in_the_dtype_of_computation(ranks: Ranks) -> None:
    _, (manifest, tensors) = ranks.publish(full=True, dtype="bfloat16")
    expected = TiedNet().state_dict()
    assert {entry.dtype for entry in manifest.entries} == {"bfloat16"}
    assert all(torch.equal(tensors[name], expected[name].to(torch.bfloat16)) for name in expected)


def test_the_manifest_is_the_same_on_every_rank(ranks: Ranks) -> None:
    first, second = (ranks.ask(rank, "manifest", True) for rank in (0, 1))
    assert first == second
    assert {tuple(entry.shape) for entry in first if "head" in entry.name} == {(23, 6)}


def test_a_gather_that_fails_on_one_rank_fails_everyone_soon_and_the_next_publish_works(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.tell(rank, "break_gather")
    start = time.monotonic()
    answers, received = ranks.publish(full=True)
    assert time.monotonic() - start < 5
    assert answers == ["publish failed in phase gather: OSError: a shard cannot be read"] * 2
    assert isinstance(received, PeerFailure)
    assert "member 0: OSError: a shard cannot be read" in str(received)
    for rank in (0, 1):
        ranks.tell(rank, "mend")
    _, (_, tensors) = ranks.publish(full=True)
    assert torch.equal(tensors["embed.weight"], TiedNet().embed.weight)


def test_a_receiver_that_leaves_fails_both_ranks_within_the_deadline(ranks: Ranks) -> None:
    start = time.monotonic()
    answers, received = ranks.publish(full=True, deadline_s=3.0, die=True)
    assert time.monotonic() - start < 8
    assert isinstance(received, KeyboardInterrupt)
    assert all(isinstance(answer, str) and "phase" in answer for answer in answers)
    answers, _ = ranks.publish(full=True)
    assert isinstance(answers[0], PublishReport)


def test_an_unsharded_model_sends_the_same_bytes_without_a_process_group(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(publishing, "buckets_of", small_buckets)
    sender = WeightSender(TiedNet(), trainable)
    order = PublishOrder(1, sender.open_rendezvous(2), True, 10.0)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive, msgspec.structs.replace(order, member=1))
        report = sender.send(order, 0)
    _, tensors = receiving.result()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TiedNet().state_dict().items())
    assert report.num_tensors == len(tensors)
    assert [step for work, step in told if work == "publish"][:2] == ["bucket 1 of version 1", "bucket 2 of version 1"]
    sender.close()


def test_a_rendezvous_that_was_not_opened_here_is_refused() -> None:
    sender, other = WeightSender(TiedNet(), trainable), WeightSender(TiedNet(), trainable)
    order = PublishOrder(1, other.open_rendezvous(2), True, 5.0)
    with pytest.raises(PublishFailure, match="call open_rendezvous first"):
        sender.send(order, 0)
    other.close()
