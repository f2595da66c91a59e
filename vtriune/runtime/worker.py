"""The main program of every worker process, `python -m vtriune.runtime`, started by a launcher."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading

from vtriune.runtime import bootstrap as control_channel
from vtriune.runtime import node as node_module
from vtriune.runtime import stacks
from vtriune.runtime.bootstrap import CONTROL_FD, Bootstrap, Ready
from vtriune.runtime.hosting import Hosting
from vtriune.runtime.node import Node

_PR_SET_PDEATHSIG = 1
_CLEANUP_S = 30.0

logger = logging.getLogger("vtriune.runtime")


def main() -> None:
    """Serve until told to stop or until the parent is gone."""
    control = socket.socket(fileno=int(os.environ.pop(CONTROL_FD)))
    body = control_channel.receive(control)
    if body is None:
        sys.exit("the parent went away before it said what to run")
    boot = control_channel.decode_bootstrap(body)
    die_with_parent(boot.parent_pid)
    set_title(f"{stacks.TITLE}{boot.mesh}-{boot.rank}")
    faulthandler.enable()
    if boot.folder:
        stacks.register(boot.folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.path[:] = [*(path for path in boot.sys_path if path not in sys.path), *sys.path]
    node = Node(
        boot.node, boot.mesh, boot.rank, boot.address, boot.limits, boot.keys, boot.folder, boot.incarnation
    )  # fmt: skip
    node_module.set_node(node)
    try:
        asyncio.run(serve(node, control, boot))
    finally:
        node.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of libraries may never end; what they registered to run at exit still runs.
        atexit._run_exitfuncs()
        os._exit(0)


async def serve(node: Node, control: socket.socket, boot: Bootstrap) -> None:
    """Host actors until SIGTERM."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    # Ctrl-C is the root's to handle: it stops its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hosting = Hosting(node, loop)
    for request in boot.actors:
        hosting.revive(request)
    node.reactor.promote(node.inbox)
    node.watcher.parent = control
    threading.Thread(target=_end_with_parent, args=(control,), name="vtriune-parent", daemon=True).start()
    control_channel.send(control, Ready(node.me))
    await ended.wait()
    try:
        await asyncio.wait_for(hosting.stop(), _CLEANUP_S)
    except TimeoutError:
        logger.error("cleanup took over %s s and was abandoned", _CLEANUP_S)


def _end_with_parent(control: socket.socket) -> None:
    while control_channel.receive(control) is not None:
        continue
    # The parent is gone: nobody is left to read an answer, and our own children see our end as we see this one.
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, and end now if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def set_title(title: str) -> None:
    """Name the process in `ps` and `top`."""
    import setproctitle

    setproctitle.setproctitle(title)
