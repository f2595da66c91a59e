"""One process runs in a folder: the second is told who, whatever became of the first's children, and a killed one holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vtriune import launch
from vtriune.config import ConfigError
from vtriune.run.lock import holder, holding

ROOT = Path(__file__).parents[2]
RUNS = """
import subprocess, sys, time
from pathlib import Path
from vtriune.run.lock import holding
with holding(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "100"])
    print(child.pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("words", [[], ["--resume"], ["--fresh"], ["--resume-from", "step-1"]])
def test_a_second_start_is_told_who_runs_and_moves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "config.yaml").write_text("of the first\n")
    with holding(folder):
        assert launch.main(["examples/digits.yaml", f"run.folder={tmp_path}", "run.name=job", *words]) == 2
    said = capsys.readouterr().err
    assert f"{folder} is being run by pid {os.getpid()} on {os.uname().nodename} since 20" in said
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".job.lock", "job"]
    assert holder(folder) is None


def test_the_lock_ends_with_the_process_that_is_killed_though_its_children_live_on(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    first = subprocess.Popen([sys.executable, "-c", RUNS, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    child = int(first.stdout.readline())
    try:
        assert holder(folder) is not None
        with pytest.raises(ConfigError, match=f"pid {first.pid} on "), holding(folder):
            pytest.fail("two hold it")
        first.send_signal(signal.SIGKILL)
        first.wait()
        os.kill(child, 0)
        assert holder(folder) is None
        with holding(folder):
            assert f"pid {os.getpid()} on" in str(holder(folder))
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_a_folder_in_which_nothing_can_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(ConfigError, match=r"run\.folder: .*runs/\.job\.lock cannot be written"),
        holding(tmp_path / "runs" / "job"),
    ):
        pytest.fail("it is held")
