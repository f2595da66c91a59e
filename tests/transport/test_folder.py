"""The socket folder is private, and goes with its owner."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from vtriune.runtime.node import this_node
from vtriune.transport.folder import SocketFolder, socket_address, sweep


def test_the_folder_is_for_its_owner_only_and_is_removed_once() -> None:
    # pytest's own folders may be too deep for a Unix socket.
    with tempfile.TemporaryDirectory() as parent:
        folder = SocketFolder(Path(parent))
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert socket_address(folder.path, "root") == f"ipc://{folder.path}/root"
        (folder.path / "root").touch()
        folder.remove()
        folder.remove()
        assert list(Path(parent).iterdir()) == []


def test_folders_of_dead_owners_are_swept_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    alive = SocketFolder(tmp_path)
    uid, pid, ticks = alive.path.name.split("-")[1:4]
    reused = tmp_path / f"vtriune-{uid}-{pid}-{int(ticks) + 1}-x"
    dead = tmp_path / f"vtriune-{uid}-{2**22 + 1}-5-x"
    foreign = tmp_path / f"vtriune-{int(uid) + 1}-{2**22 + 1}-5-x"
    for folder in (reused, dead, foreign):
        folder.mkdir()
        (folder / "root").touch()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive.path, foreign])
    alive.remove()


def test_a_forked_copy_of_the_owner_does_not_remove_it(tmp_path: Path) -> None:
    folder = SocketFolder(tmp_path)
    pid = os.fork()
    if not pid:
        folder.remove()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert folder.path.exists()
    folder.remove()


def test_a_path_too_long_for_a_socket_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60)
    with pytest.raises(ValueError, match="set TMPDIR to a shorter path"):
        socket_address(deep, "x" * 40)
    with pytest.raises(ValueError, match="set TMPDIR to a shorter path"):
        this_node().address_for("x" * 100)
