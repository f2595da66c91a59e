"""Files at an address are copied once and read as files; what cannot be had is named."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from vtriune.config.sections.data import Files
from vtriune.data.build import build_store
from vtriune.data.inputs import data_files
from vtriune.data.schema import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vtriune"


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    for each in files.ls("/", detail=False):
        files.rm(each, recursive=True)


def question(number: int) -> str:
    return json.dumps({"question": f"{number} + 1?", "answer": str(number + 1)}) + "\n"


def test_a_file_a_folder_and_a_pattern_are_read_as_files_of_their_names(bucket: fsspec.AbstractFileSystem) -> None:
    for name in ("test/b.jsonl", "test/a.jsonl", "test/README.md"):
        bucket.pipe(f"/mine/{name}", question(1).encode())
    for address in ("memory://mine/test", "memory://mine/test/*.jsonl"):
        paths = [given.path for given in data_files("data.test", [address])]
        assert [path.parts[-2:] for path in paths] == [("test", "a.jsonl"), ("test", "b.jsonl")]
    (given,) = data_files(
        "data.test", [Files(files=["memory://mine/test/a.jsonl"], verifier="counting", source="sums")]
    )
    assert given.path.read_text() == question(1)
    assert given.said.source == "sums"


def test_it_is_copied_once_and_anew_when_it_has_changed(
    bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/mine/a.jsonl", question(1).encode())
    (first,) = data_files("data.train", ["memory://mine/a.jsonl"])
    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "get_file", None)
        assert data_files("data.train", ["memory://mine/a.jsonl"]) == [first]
    bucket.pipe("/mine/a.jsonl", (question(1) + question(2)).encode())
    (second,) = data_files("data.train", ["memory://mine/a.jsonl"])
    assert (len(first.path.read_text().splitlines()), len(second.path.read_text().splitlines())) == (1, 2)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://mine/none.jsonl", "data.train: memory://mine/none.jsonl matches no file"),
        ("memory://mine/*.parquet", "data.train: memory://mine/\\*.parquet matches no file"),
        ("nosuch://mine/a.jsonl", "data.train: nosuch://mine/a.jsonl cannot be read .*nosuch"),
        ("http://127.0.0.1:9/a.jsonl", "data.train: http://127.0.0.1:9/a.jsonl (cannot be read|matches no file)"),
    ],
)
def test_what_cannot_be_had_is_named(address: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data_files("data.train", [address])


def test_a_copy_that_fails_leaves_nothing(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(self: object, path: str, target: str, **_: object) -> None:
        Path(target).write_bytes(b"{")
        raise ConnectionResetError("cut off")

    bucket.pipe("/mine/a.jsonl", question(1).encode())
    monkeypatch.setattr(type(bucket), "get_file", cut_off)
    with pytest.raises(DataError, match=r"cannot be read \(ConnectionResetError: cut off"):
        data_files("data.train", ["memory://mine/a.jsonl"])
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_store_is_built_of_what_a_server_sends(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(map(question, range(5))))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/sums.jsonl"
            given = data_files("data.train", [Files(files=[address], verifier="counting")])
        finally:
            server.shutdown()
            thread.join()
    shutil.rmtree(folder)
    assert len(build_store(given, tmp_path / "stores")) == 5
