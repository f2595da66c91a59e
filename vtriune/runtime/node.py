"""This process as a member of the run: its inbox, its links to others, the actors it hosts. One per process.

The root process gets its node on first use; a worker makes its own from what its parent hands it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtriune.runtime.failure import note_from_error
from vtriune.transport.errors import MeshFailure, MessageRefused
from vtriune.transport.folder import SocketFolder
from vtriune.transport.inbox import Inbox, Session
from vtriune.transport.link import Link
from vtriune.transport.reactor import Reactor
from vtriune.transport.wire import Call, FailureNote, Gone, Limits, PeerRef

if TYPE_CHECKING:
    from vtriune.runtime.hosting import ActorHost, Hosting
    from vtriune.runtime.watcher import Watcher

SYSTEM = ""


class Node:
    """Reactor, inbox and links of one process."""

    def __init__(self, name: str, mesh: str, rank: int, limits: Limits, folder: str, incarnation: int = 0) -> None:
        self.limits = limits
        self.folder = folder
        self.reactor = Reactor()
        self.incarnation = incarnation
        self.hosting: Hosting | None = None
        self.inbox = Inbox(self.reactor, limits, name, incarnation, self, None)
        address = self.inbox.bind(f"ipc://{folder}/{name}")
        self.me = PeerRef(name, address, mesh, rank, socket.gethostname(), os.getpid())
        self._links: dict[str, Link] = {}
        self._link_ids = itertools.count(1)
        self._names = itertools.count(1)
        self._watcher: Watcher | None = None
        self._lock = threading.Lock()
        self.is_closed = False

    @property
    def watcher(self) -> Watcher:
        """The thread that starts and watches child processes; started when first needed."""
        with self._lock:
            if self._watcher is None:
                from vtriune.runtime.watcher import Watcher

                self._watcher = Watcher(self)
            return self._watcher

    def unique(self, name: str) -> str:
        """A name no other node or actor of this run has."""
        return f"{name}#{self.me.node.rpartition('/')[2]}.{next(self._names)}"

    def link(self, peer: PeerRef) -> Link:
        """The link to a process, opened on first use."""
        link = self._links.get(peer.node)
        if link is None:
            with self.reactor.lock:
                link = self._links.get(peer.node)
                if link is None:
                    link = Link(self.reactor, self.limits, self.me, peer, next(self._link_ids), None)
                    self._links[peer.node] = link
        return link

    def peer_gone(self, node: str, failure: MeshFailure, *, tell: bool) -> int:
        """Fail everything that waits for a process; `tell` the other processes this one has links to.

        Returns the number of calls that ended in the failure.
        """
        with self.reactor.lock:
            link = self._links.get(node)
            num_failed = link.fail(failure) if link is not None else 0
            self.inbox.forget(node)
            if tell:
                for other in self._links.values():
                    if other.failure is None:
                        other.tell(Gone(node, failure.note))
        return num_failed

    # ---- what the inbox hands on

    def on_call(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        """Start a call on the actor it names."""
        if self.hosting is None:
            session.fault(call.id, note_from_error(MessageRefused("this process hosts no actors")))
        else:
            self.hosting.on_call(session, call, frames)

    def on_cancel(self, session: Session, call_id: int) -> None:
        """Cancel a running call."""
        if self.hosting is not None:
            self.hosting.on_cancel(session, call_id)

    def on_gone(self, gone: Gone) -> None:
        """A process this one may have calls at has failed."""
        self.peer_gone(gone.node, MeshFailure(gone.failure), tell=False)

    def report(self, host: ActorHost | None, note: FailureNote) -> None:
        """An actor failed outside any awaited call: tell its owner, the parent process."""
        self.watcher.report_to_parent(note)

    def close(self) -> None:
        """End children, close sockets. Idempotent."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
        if self._watcher is not None:
            self._watcher.close()
        with self.reactor.lock:
            for link in self._links.values():
                link.close()
            self.inbox.close()
        self.reactor.close()


_node: Node | None = None
_folder: SocketFolder | None = None
_node_lock = threading.Lock()


def this_node() -> Node:
    """The process's node; in the root process it is made on first use."""
    global _node, _folder
    node = _node
    if node is None or node.is_closed:
        with _node_lock:
            if _node is None or _node.is_closed:
                _folder = SocketFolder()
                _node = Node("root", "root", 0, Limits(), str(_folder.path))
                atexit.register(shutdown)
            node = _node
    return node


def set_node(node: Node) -> None:
    """Make `node` this process's node. A worker does so before anything else."""
    global _node
    _node = node


def shutdown() -> None:
    """End every process this one started, close its sockets and remove the socket folder. Idempotent."""
    global _folder
    node, folder = _node, _folder
    if node is not None:
        node.close()
    if folder is not None:
        folder.remove()
        _folder = None
