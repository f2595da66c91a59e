"""This process as a member of the run: its inbox, its links to others, the actors it hosts. One per process.

The root process gets its node on first use; a worker makes its own from what its parent hands it.
"""

from __future__ import annotations

import atexit
import ipaddress
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable

from vtriune.runtime import bootstrap as control_channel
from vtriune.runtime.watcher import ProcessWatcher
from vtriune.transport.errors import MeshFailure
from vtriune.transport.folder import SocketFolder, socket_address
from vtriune.transport.inbox import Inbox
from vtriune.transport.link import Link
from vtriune.transport.reactor import Reactor
from vtriune.transport.security import RunKeys, Security, new_keys
from vtriune.transport.wire import Back, FailureNote, Gone, Limits, PeerRef

logger = logging.getLogger("vtriune.runtime")

SYSTEM = ""
"""The actor id of calls to the process itself: to spawn or stop an actor, to tell its stacks."""


class Node:
    """Reactor, inbox and links of one process.

    Args:
        name: Unique in the run; also the socket's file name.
        address: Where to listen: `ipc://...`, or `tcp://host:port` (port 0: any), which needs `keys`.
    """

    def __init__(
        self,
        name: str,
        mesh: str,
        rank: int,
        address: str,
        limits: Limits,
        keys: RunKeys | None = None,
        folder: str = "",
        incarnation: int = 0,
    ) -> None:
        self.limits = limits
        self.folder = folder
        self.keys = keys
        self.reactor = Reactor()
        self.security = None if keys is None else Security(self.reactor.context, keys)
        is_tcp = address.startswith("tcp://")
        if is_tcp and self.security is None:
            raise ValueError(f"{address} needs the run's keys: no socket but ipc:// is open to everyone")
        self.inbox = Inbox(self.reactor, limits, incarnation, self, self.security if is_tcp else None, address)
        self.me = PeerRef(name, self.inbox.address, mesh, rank, socket.gethostname(), os.getpid())
        self.links: dict[str, Link] = {}
        self._moved: dict[str, PeerRef] = {}
        """Where processes that were restarted listen now, by node."""
        self._announced: dict[str, Back] = {}
        """Of those that this process restarted: what it tells others."""
        # A restarted process must not be taken for its predecessor: links of both have distinct ids.
        self._link_ids = itertools.count(int.from_bytes(os.urandom(6), "little"))
        self._names = itertools.count(1)
        self._watcher: ProcessWatcher | None = None
        self._lock = threading.Lock()
        # Children of this process by node name: told when a link finds one unreachable.
        self.on_unreachable: dict[str, Callable[[MeshFailure], None]] = {}
        self.parent: socket.socket | None = None
        self.is_closed = False

    @property
    def watcher(self) -> ProcessWatcher:
        """The thread that starts and watches child processes; started when first needed."""
        with self._lock:
            if self._watcher is None:
                self._watcher = ProcessWatcher(self.reactor.tick)
            return self._watcher

    def unique(self, name: str) -> str:
        """A name no other node or actor of this run has."""
        return f"{name}#{self.me.node}.{next(self._names)}"

    def address_for(self, name: str) -> str:
        """Where a new process on this machine should listen: beside this one."""
        if self.me.address.startswith("tcp://"):
            return f"{self.me.address.rpartition(':')[0]}:0"
        return socket_address(self.folder, name)

    def link(self, peer: PeerRef) -> Link:
        """The link to a process, opened on first use."""
        link = self.links.get(peer.node)
        if link is None:
            with self.reactor.lock:
                link = self.links.get(peer.node)
                if link is None:
                    peer = self.whereabouts(peer)
                    ends = self.me, peer, next(self._link_ids), self.security
                    link = Link(self.reactor, self.limits, *ends, self._on_lost_peer, self._tell_moves)
                    self.links[peer.node] = link
        return link

    def whereabouts(self, peer: PeerRef) -> PeerRef:
        """Where a process is now: a restarted one listens elsewhere than the one it replaces."""
        return self._moved.get(peer.node, peer)

    def announce(self, news: Gone | Back) -> int:
        """A child of this process has failed or runs again: act on it, and tell the processes this one has links to.

        Returns the number of calls that ended in the failure.
        """
        with self.reactor.lock:
            num_failed = 0
            if isinstance(news, Gone):
                num_failed = self.on_gone(news)
            else:
                self._announced[news.peer.node] = news
                self.on_back(news)
            for link in self.links.values():
                if link.failure is None:
                    link.tell(news)
            return num_failed

    def _tell_moves(self, link: Link) -> None:
        """A process may have been given references before a restart that ended while its link was not open yet."""
        for news in self._announced.values():
            link.tell(news)

    def _on_lost_peer(self, link: Link, failure: MeshFailure) -> None:
        """A link gave its peer up: if that is a child of ours, its group decides what it means."""
        action = self.on_unreachable.get(link.peer.node)
        if action is not None:
            self.watcher.do(lambda: action(failure))

    # ---- what the inbox hands on

    def on_gone(self, gone: Gone) -> int:
        """Fail everything that waits for a process; returns the number of calls that ended so."""
        with self.reactor.lock:
            self.inbox.forget(gone.node)
            link = self.links.get(gone.node)
            return 0 if link is None else link.fail(MeshFailure(gone.failure))

    def on_back(self, back: Back) -> None:
        """A process that had gone runs again, perhaps at another address."""
        with self.reactor.lock:
            self._moved[back.peer.node] = back.peer
            link = self.links.get(back.peer.node)
            if link is not None:
                link.move(back.peer)

    def report(self, note: FailureNote) -> None:
        """An actor failed outside any awaited call: tell its owner, the parent process."""
        if self.parent is not None:
            try:
                control_channel.send(self.parent, control_channel.Report(note))
            except OSError:
                # The parent is gone, and this process with it in a moment.
                logger.error("could not report to the parent: %s", note)

    def close(self) -> None:
        """End children, close sockets. Idempotent."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
        if self._watcher is not None:
            self._watcher.close()
        with self.reactor.lock:
            for link in self.links.values():
                link.close()
            self.inbox.close()
        if self.security is not None:
            self.security.close()
        self.reactor.close()


_node: Node | None = None
_folder: SocketFolder | None = None
_bind = ""
_limits = Limits()
_node_lock = threading.Lock()


def configure(bind: str = "", limits: Limits | None = None) -> None:
    """Choose the run's network and limits, before anything is spawned.

    Args:
        bind: Address of the interface to listen on, for runs across hosts: every socket then speaks CURVE with keys
            made for this run. Empty: `ipc://` sockets in a private folder.
        limits: Bounds on messages and queues, for every process of the run.

    Raises:
        RuntimeError: the runtime is in use already.
        ValueError: `bind` is no IP address, or a wildcard, which peers could not connect to.
    """
    global _bind, _limits
    if _node is not None and not _node.is_closed:
        raise RuntimeError("configure() must come before the first spawn")
    if bind and ipaddress.ip_address(bind).is_unspecified:
        raise ValueError(f"bind={bind!r}: name the address of one interface, which other hosts can connect to")
    _bind = bind
    _limits = limits or Limits()


def this_node() -> Node:
    """The process's node; in the root process it is made on first use."""
    global _node, _folder
    node = _node
    if node is None or node.is_closed:
        with _node_lock:
            if _node is None or _node.is_closed:
                _folder = SocketFolder()
                folder = str(_folder.path)
                address = f"tcp://{_bind}:0" if _bind else socket_address(folder, "root")
                _node = Node("root", "root", 0, address, _limits, new_keys() if _bind else None, folder)
                atexit.register(shutdown)
            node = _node
    return node


def interface_of(peer: PeerRef | None = None) -> str:
    """Address of the interface that a process (this one by default) listens on: where sockets it opens beside ours can be
    reached by the run's other processes. Loopback for `ipc://`, whose run is on one machine."""
    address = (peer or this_node().me).address
    return address.removeprefix("tcp://").rpartition(":")[0] if address.startswith("tcp://") else "127.0.0.1"


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
