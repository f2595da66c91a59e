"""The main program of every worker process, `python -m vtriune.runtime`, started by a launcher."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import functools
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable

import setproctitle

from verifiers import terminal
from vtriune.runtime import bootstrap as control_channel
from vtriune.runtime import node as node_module
from vtriune.runtime import stacks, steps
from vtriune.runtime.bootstrap import CONTROL_FD, LEFT_TO_ROOT, Bootstrap, Ready
from vtriune.runtime.hosting import Hosting
from vtriune.runtime.node import Node

_PR_SET_PDEATHSIG = 1
_CLEANUP_S = 30.0
_TELL_EVERY_MS = 1000

logger = logging.getLogger("vtriune.runtime")


def main() -> None:
    """Serve until told to stop or until the parent is gone."""
    for number in LEFT_TO_ROOT:
        signal.signal(number, signal.SIG_IGN)
    # Blocked by the parent until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_ROOT)
    terminal.open_output(encoding="utf-8")
    control = socket.socket(fileno=int(os.environ.pop(CONTROL_FD)))
    body = control_channel.receive(control)
    if body is None:
        sys.exit("the parent went away before it said what to run")
    boot = control_channel.decode_bootstrap(body)
    die_with_parent(boot.parent_pid)
    setproctitle.setproctitle(f"{stacks.TITLE}{boot.mesh}-{boot.rank}")
    faulthandler.enable()
    if boot.folder:
        stacks.register(boot.folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.path[:] = [*(path for path in boot.sys_path if path not in sys.path), *sys.path]
    where = boot.node, boot.mesh, boot.rank, boot.address
    node = Node(*where, boot.limits, boot.keys, boot.folder, boot.incarnation)
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
    """Host actors until the parent says stop."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    hosting = Hosting(node, loop)
    for request in boot.actors:
        hosting.revive(request)
    node.reactor.promote(node.inbox)
    node.parent = control
    stop = functools.partial(loop.call_soon_threadsafe, ended.set)
    threading.Thread(target=_follow_parent, args=(control, stop), name="vtriune-parent", daemon=True).start()
    control_channel.send(control, Ready(node.me))
    await ended.wait()
    try:
        await asyncio.wait_for(hosting.stop(), _CLEANUP_S)
    except TimeoutError:
        logger.error("cleanup took over %s s and was abandoned", _CLEANUP_S)


def _follow_parent(control: socket.socket, stop: Callable[[], object]) -> None:
    """Stop when the parent says so, end with it; and tell it once a second how far this process's work is, whatever its loop does."""
    told: steps.Steps = {}
    heard = select.poll()
    heard.register(control, select.POLLIN)
    while True:
        if heard.poll(_TELL_EVERY_MS):
            if control_channel.receive(control) is None:
                break
            with contextlib.suppress(RuntimeError):  # It is ending already: its loop is closed.
                stop()
        with contextlib.suppress(OSError):  # The parent is gone: its end of file is next.
            for step in steps.moved(told):
                control_channel.send(control, step)
    # The parent is gone: nobody is left to read an answer, and our own children see our end as we see this one.
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, and end now if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
