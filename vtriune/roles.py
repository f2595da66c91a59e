"""The four roles of a run as the run calls them: a Protocol each, so that `vtriune.run` knows neither `actors` nor `learner`.

Actors implement a role by endpoints of the same names and annotations; the type checker compares them where `launch` names the
classes. A parameter annotated with a role takes a mesh of such actors, and calls through it are typed and checked at both ends.

Any call may raise MeshFailure (a process of the mesh is dead), ConnectionLost (alive, but cut off) or ActorError (the endpoint
raised; its `kind` says what that costs). Below stands what besides, and when each is called.
"""

from typing import Protocol

from vtriune.messages import (
    Canary,
    Example,
    Group,
    GroupReport,
    Lease,
    PublishOrder,
    PublishReport,
    Purpose,
    Rendezvous,
    ScoredGroup,
    StepRecord,
    TrainOrder,
    TrainReport,
)
from vtriune.runtime import ActorReference, endpoint


class Generator(ActorReference, Protocol):
    """One engine, a mesh of one rank. Calls overlap."""

    @endpoint
    async def ready(self) -> None:
        """First call: returns once the engine is built, which may take minutes."""

    @endpoint
    async def generate(self, lease: Lease, others: list["Generator"]) -> GroupReport:
        """Per lease: sample the group, shared with the `others`, have it scored and delivered; returns when it is."""

    @endpoint
    async def sample(self, lease: Lease) -> Group:
        """By the generator that holds the lease of a shared group: a share of it, not scored."""

    @endpoint
    async def receive(self, order: PublishOrder) -> PublishReport:
        """Per publish, while the learner sends. Of kind `bystander` where this engine is unharmed and keeps its version."""

    @endpoint
    async def canary(self, canary: Canary) -> list[float]:
        """After each publish: log-prob of each of the response's tokens, in nats."""

    @endpoint
    async def stats(self) -> dict[str, float]:
        """Once per version: shares of the time and rates since the last call."""


class VerifierPool(ActorReference, Protocol):
    """A rank per verifier process; each scores any group. Calls overlap."""

    @endpoint
    async def ready(self) -> None:
        """First call: returns once answers can be scored."""

    @endpoint
    async def score(self, group: Group) -> GroupReport:
        """By generators: score, deliver to learner and recorder, report. Of kind `fatal` where a verifier keeps failing."""

    @endpoint
    async def metrics(self) -> dict[str, float]:
        """Once per version: the pool's figures since the last call."""


class Learner(ActorReference, Protocol):
    """All ranks of the learner. Calls run one at a time, in order, but for `deliver` and `saved`, which overlap with them.

    Every call but `open_store`, `open_rendezvous` and `deliver` is collective: made on all ranks.
    """

    @endpoint
    def open_store(self) -> int:
        """First, on rank 0: where the ranks meet; a port."""

    @endpoint
    def connect(self, host: str, port: int) -> None:
        """Second: join the other ranks at that address of rank 0, load the model."""

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        """By verifiers, to all ranks, at any time: keep a group, which comes without its texts, until it is ordered."""

    @endpoint
    def train(self, order: TrainOrder) -> TrainReport:
        """Once per version: one rollout batch. Rank 0's report holds the metrics, reduced over ranks."""

    @endpoint
    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Before each attempt at a publish, on rank 0: where sender and receivers meet."""

    @endpoint
    def publish(self, order: PublishOrder) -> PublishReport:
        """Per attempt at a publish: send the weights. Of kind `bystander` or `engine` where a receiver is to blame."""

    @endpoint
    def canary(self, canary: Canary) -> list[float]:
        """After each publish: as the generator's, under the weights that were sent."""

    @endpoint
    def save(self, folder: str) -> None:
        """Per checkpoint: copy the state and begin to write it below `folder`; waits for the write before."""

    @endpoint
    async def saved(self) -> None:
        """After `save`, while training goes on: returns once this part is on disk. Raises what broke the write."""

    @endpoint
    def load(self, folder: str) -> None:
        """Once, before the first version of a resumed run."""


class Recorder(ActorReference, Protocol):
    """One rank beside the controller. Calls overlap."""

    @endpoint
    async def record_group(self, group: ScoredGroup) -> None:
        """By verifiers: keep a group, of training or evaluation, until its step is recorded."""

    @endpoint
    async def record_step(self, record: StepRecord) -> dict[str, float]:
        """Once per version: its line, which is written once its groups are archived. Raises what writing the version before did."""

    @endpoint
    async def example(self, purpose: Purpose) -> Example | None:
        """When an alarm rings: a response of the version recorded last, or of its evaluation; None when there was none."""

    @endpoint
    async def recorded(self) -> None:
        """Per checkpoint, before it is complete: returns once the archives and lines of every version so far are on disk. Raises what
        broke a write."""

    @endpoint
    async def truncate_after(self, version: int) -> int:
        """Once, before the first group of a resumed run: forget what lies beyond the checkpoint of `version`. Returns an attempt
        above that of every unconsumed group in the archive."""

    @endpoint
    async def close(self) -> None:
        """Last call: everything is on disk."""
