"""Output that cannot be written, or read by nobody, ends no program."""

import ast
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.test_imports import PRODUCT, ROOT, files

ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
WRITES = r"""
import sys
from verifiers import terminal
terminal.open_output(waits={waits})
for number in range({times}):
    print("gain \N{{MIDDLE DOT}} 1 \N{{RIGHTWARDS ARROW}} 2", number, "x" * 1000)
terminal.drain()
open(sys.argv[1], "w").write(terminal.lost())
"""


def write_to(
    told: Path, *, times: int = 3, waits: bool = True, env: dict[str, str] | None = None, **streams: Any
) -> str:
    """What a program that writes `times` lines says was lost, after it has ended well."""
    program = [sys.executable, "-c", WRITES.format(waits=waits, times=times), str(told)]
    done = subprocess.run(
        program, env={**os.environ, **(env or {})}, cwd=ROOT, timeout=60, **{"stderr": subprocess.PIPE, **streams}
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return told.read_text()


@pytest.mark.parametrize("waits", [True, False])
def test_a_pipe_without_a_reader_ends_nothing(tmp_path: Path, waits: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert write_to(tmp_path / "told", waits=waits, stdout=writer) == "Broken pipe"
    os.close(writer)


def test_a_full_disk_under_the_output_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        assert write_to(tmp_path / "told", stdout=full) == "No space left on device"


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    os.close(master)
    assert write_to(tmp_path / "told", stdout=terminal) == "Input/output error"
    os.close(terminal)


def test_output_closed_before_the_start_ends_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WRITES.format(waits=True, times=3), str(tmp_path / "told")]
    subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *program], check=True, cwd=ROOT, timeout=60)
    assert (tmp_path / "told").read_text() == ""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_takes_nothing_holds_up_nothing_that_does_not_wait_for_it(tmp_path: Path, kind: str) -> None:
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    started = time.monotonic()
    assert write_to(tmp_path / "told", times=5000, waits=False, stdout=writer) == "nobody reads it"
    assert time.monotonic() - started < 30
    os.close(reader)
    os.close(writer)


IN_THE_BACKGROUND = """
import fcntl, os, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
mode = termios.tcgetattr(0)
mode[3] |= termios.TOSTOP
termios.tcsetattr(0, termios.TCSANOW, mode)
child = subprocess.Popen(sys.argv[1:], process_group=0)
print("stopped" if os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1]) else "ended", file=sys.stderr)
child.kill()
"""


def test_a_terminal_that_stops_who_writes_from_the_background_stops_nothing(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    writer = [sys.executable, "-c", WRITES.format(waits=False, times=3), str(tmp_path / "told")]
    shell = [sys.executable, "-c", IN_THE_BACKGROUND, *writer]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": subprocess.PIPE}
    done = subprocess.run(shell, cwd=ROOT, start_new_session=True, timeout=60, text=True, **streams)
    assert done.stderr.startswith("ended")
    os.close(terminal)
    os.close(master)


def test_letters_that_the_terminal_does_not_know_become_question_marks(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("wb") as shown:
        assert write_to(tmp_path / "told", env=ASCII, stdout=shown) == ""
    assert (tmp_path / "shown").read_text().startswith("gain ? 1 ? 2 0 xxx")


@pytest.mark.parametrize("waits", [True, False])
def test_all_of_the_output_arrives_in_order_at_a_reader_that_takes_it(tmp_path: Path, waits: bool) -> None:
    with (tmp_path / "shown").open("wb") as shown:
        write_to(tmp_path / "told", times=500, waits=waits, stdout=shown)
    lines = (tmp_path / "shown").read_text(encoding="utf-8").splitlines()
    assert [line.split()[5] for line in lines] == [str(number) for number in range(500)]


def programs() -> list[Path]:
    """Every command line of the product and of the examples. Workers of the pool write to a file of their own."""
    found = [path for package in (*PRODUCT, "bench", "examples") for path in files(package) if is_program(path)]
    return [path for path in found if path.relative_to(ROOT).as_posix() != "verifiers/worker.py"]


def is_program(path: Path) -> bool:
    return path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text()


def test_ctrl_c_ends_a_command_with_one_word_and_an_error_still_with_its_traceback() -> None:
    endings = []
    for error in ("KeyboardInterrupt", "ValueError('of ours')"):
        program = f"from verifiers import terminal; terminal.open_output(); raise {error}"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
        endings.append((done.returncode, done.stderr))
    assert endings[0] == (-signal.SIGINT, "interrupted\n")
    assert endings[1][0] == 1
    assert endings[1][1].startswith("Traceback")
    assert endings[1][1].endswith("ValueError: of ours\n")


def test_every_program_opens_its_output_so() -> None:
    worker = ROOT / "vtriune" / "runtime" / "processes" / "worker.py"
    paths = [worker if path == ROOT / "vtriune/runtime/__main__.py" else path for path in programs()]
    assert len(paths) > 10
    silent = [path for path in paths if "terminal.open_output(" not in path.read_text()]
    assert silent == []


COMMANDS = [
    ["vtriune.launch", "--help-config"],
    ["vtriune.control", "--help"],
    ["vtriune.export", "--help"],
    ["vtriune.plan", "--help"],
    ["vtriune.config.document"],
    ["verifiers.rescore", "--help"],
    ["verifiers.serve", "--help"],
    ["learner.replay", "--help"],
]


def test_commands_whose_output_is_cut_off_say_nothing_of_it_and_end_well() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    started = [
        subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
        for command in COMMANDS
    ]
    os.close(writer)
    for command, process in zip(COMMANDS, started, strict=True):
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, ""), command


def test_nothing_reads_standard_input_and_children_get_none_or_a_pipe_of_their_own() -> None:
    for path in (path for package in PRODUCT for path in files(package)):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("input", "getpass", "getpass.getpass"), path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdin"), path
            if isinstance(node, ast.Call) and name in ("subprocess.Popen", "subprocess.run"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("stdin") in ("subprocess.DEVNULL", "subprocess.PIPE"), f"{path}:{node.lineno}"
