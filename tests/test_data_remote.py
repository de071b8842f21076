"""Shards from elsewhere: the same pairs as from disk, over a bad connection too; kept on disk; failures counted."""

import hashlib
import os
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import boto3
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from moto.server import ThreadedMotoServer

from pair_files import assert_continues, numbered, opened, same, take, write_tar
from ssmclip.__main__ import main
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.config.places import checkout
from ssmclip.data.pairs import remote
from ssmclip.data.pairs.loader import Remote, Weighted
from ssmclip.data.pairs.remote import open_shard
from ssmclip.train import train

HASTY = Remote(retries=3, pause_s=0.01)


class Server:
    """Files of a folder at an address. ranges: whether parts can be asked for; failures: of a file's next requests.

    A failure is a status, or "cut": half of what is asked for is sent.
    """

    def __init__(self, folder):
        self.folder, self.ranges, self.failures, self.gets = folder, True, {}, Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                server.gets[self.path[1:]] += 1
                self.answer(body=True)

            def answer(self, body):
                path = server.folder / self.path[1:]
                failure = server.failures.get(path.name, []) if body else []
                failure = failure.pop(0) if failure else None
                if not path.is_file() or isinstance(failure, int):
                    self.send_error(failure or 404)
                    return
                data = path.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
                if asked:
                    data = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"web/{shard}.tar", numbered(range(10 * shard, 10 * shard + 10)))
    made = Server(tmp_path / "web")
    yield made
    made.stop()


def read(address, how=HASTY):
    with open_shard(address, how) as stream:
        return stream.read()


# ---- the same pairs


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_server_give_the_pairs_of_the_folder(server, workers):
    source = server.address + "/{0..2}.tar"
    settings = {"workers": workers, "shuffle_buffer": 7, "cache_mib": 0}
    loader = opened(source, 4, remote=HASTY, **settings)
    assert all(
        same(a, b)
        for a, b in zip(
            take(loader, 20), take(opened(str(server.folder / "{0..2}.tar"), 4, **settings), 20), strict=True
        )
    )
    assert loader.num_samples is None
    assert loader.skipped == {}
    loader.close()


def test_a_remote_stream_continues(server):
    source = server.address + "/{0..2}.tar"
    assert_continues(lambda cursor: opened(source, 4, remote=HASTY, cursor=cursor, shuffle_buffer=7), before=2)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("failures", [[500], ["cut"], ["cut", 503, "cut"], [429, 408]])
def test_a_bad_connection_is_read_on_where_it_broke(server, ranges, failures):
    server.ranges = ranges
    content = os.urandom(3 * 2**20 + 17)
    (server.folder / "x.tar").write_bytes(content)
    server.failures["x.tar"] = list(failures)
    assert read(f"{server.address}/x.tar") == content
    assert server.failures["x.tar"] == []


def test_it_is_given_up_after_so_many_times(server, caplog):
    server.failures["0.tar"] = [500] * 20
    with pytest.raises(Exception, match="500"):
        read(f"{server.address}/0.tar")
    assert server.gets["0.tar"] == HASTY.retries + 1
    pauses = [float(record.getMessage().split()[-2]) for record in caplog.records]
    assert pauses == [0.01, 0.02, 0.04]


# ---- what fails


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_that_cannot_be_read_is_counted_and_named(server, workers):
    write_tar(server.folder / "3.tar", numbered(range(30, 40)))
    (server.folder / "1.tar").unlink()
    server.failures["2.tar"] = [500] * 1000
    (server.folder / "3.tar").write_bytes((server.folder / "3.tar").read_bytes()[:5000])
    loader = opened(server.address + "/{0..3}.tar", 4, remote=HASTY, workers=workers, shuffle_buffer=5)
    keys = {key for batch in take(loader, 24) for key in batch.keys}
    assert {f"{n:04d}" for n in range(10)} <= keys
    assert not keys & {f"{n:04d}" for n in range(10, 30)}
    assert set(loader.skipped) == {"missing shard", "truncated shard"}
    missing = loader.skipped_examples["missing shard"]
    assert {name.split(": ")[0] for name in missing} == {f"{server.address}/{n}.tar" for n in (1, 2)}
    assert any("404" in name for name in missing)
    assert any("500" in name for name in missing)
    loader.close()


def test_a_server_that_cannot_be_reached_is_asked_again(server, caplog):
    server.stop()
    with pytest.raises(FileNotFoundError):
        read(f"{server.address}/0.tar")
    assert len(caplog.records) == HASTY.retries


def test_a_package_that_is_missing_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    settings = ["source=gs://bucket/0.tar", "image_sizes=[[0, 32]]", "tensorboard=false"]
    recipe = str(checkout() / "recipes" / "tiny.py")
    assert main(["train", recipe, "--set", *settings, "--out", str(tmp_path / "run")]) == 1
    assert "ssmclip train: gs://bucket/0.tar needs gcsfs: pip install gcsfs" in capsys.readouterr().err


def test_what_is_not_there_is_not_asked_for_again(server, caplog):
    with pytest.raises(FileNotFoundError):
        read(f"{server.address}/9.tar")
    server.failures["0.tar"] = [403] * 9
    with pytest.raises(aiohttp.ClientResponseError, match="403"):
        read(f"{server.address}/0.tar")
    assert caplog.records == []


def test_training_reports_shards_by_name(server, tmp_path, capsys):
    (server.folder / "1.tar").unlink()
    changes = ["progress=false", "tensorboard=false", "warmup_steps=1", "batch_size=8", "device=cpu", "steps=4"]
    changes += ["image_sizes=[[0, 32]]", f"source={server.address}/{{0..2}}.tar", f"cache_dir={tmp_path / 'kept'}"]
    train(apply_overrides(load_recipe(checkout() / "recipes" / "tiny.py"), changes), tmp_path / "run")
    assert f'missing shard, such as ["{server.address}/1.tar: ClientResponseError: 404' in capsys.readouterr().err
    assert len(list((tmp_path / "kept").glob("*.tar"))) == 2


def test_a_source_that_cannot_be_reached_is_named_at_once(server):
    server.stop()
    with pytest.raises(
        FileNotFoundError,
        match=rf"none of the first 1 of 1 shards can be read: {server.address}/0.tar: ClientConnector.*Cannot connect",
    ):
        opened(f"{server.address}/0.tar", remote=HASTY)
    with pytest.raises(FileNotFoundError, match=rf"{server.address}/\*.tar\* cannot be listed: ClientConnector"):
        opened(f"{server.address}/", remote=HASTY)
    parts = [Weighted("synthetic:quickstart", 1), Weighted(f"{server.address}/{{0..9}}.tar", 1, "far")]
    with pytest.raises(FileNotFoundError, match=r"none of the first 3 of 10 shards can be read"):
        opened(parts, remote=HASTY)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")])
def test_a_package_that_is_missing_is_named(monkeypatch, scheme, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for each in (scheme, "https", "gcs"):
        monkeypatch.delitem(_registry, each, raising=False)
    with pytest.raises(ImportError, match=rf"{scheme}://bucket/0.tar needs {package}: pip install {package}"):
        opened(f"{scheme}://bucket/0.tar")


# ---- object stores, by a stand-in for their file system


class FakeStore(MemoryFileSystem):
    """Objects of buckets in memory, under the scheme of a real store; the first `failures` reads fail."""

    protocol = "s3"
    store, pseudo_dirs, failures = {}, [""], 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol("memory://" + path.removeprefix("s3://"))

    def unstrip_protocol(self, name):
        return f"s3:/{name}"

    def _open(self, path, *args, **kwargs):
        file = super()._open(path, *args, **kwargs)
        original = file.read

        def fail_sometimes(size=-1):
            if FakeStore.failures > 0:
                FakeStore.failures -= 1
                raise OSError("the store is busy: slow down")
            return original(min(size, 1000) if size > 0 else size)

        file.read = fail_sometimes
        file.close = lambda: None
        return file


@pytest.fixture
def store(server, monkeypatch):
    """The server's shards in s3://bucket/pairs/."""
    monkeypatch.setitem(_registry, "s3", FakeStore)
    monkeypatch.setattr(FakeStore, "store", {})
    monkeypatch.setattr(FakeStore, "pseudo_dirs", [""])
    files = fsspec.filesystem("s3")
    for path in server.folder.glob("*.tar"):
        files.pipe_file(f"/bucket/pairs/{path.name}", path.read_bytes())
    return server.folder


@pytest.mark.parametrize("name", ["s3://bucket/pairs/", "s3://bucket/pairs/*.tar", "s3://bucket/pairs/{0..2}.tar"])
def test_a_folder_a_glob_and_braces_of_a_store(store, name):
    FakeStore.failures = 3
    loader, local = opened(name, 4, remote=HASTY), opened(store, 4, cache_mib=0)
    assert all(same(a, b) for a, b in zip(take(loader, 12), take(local, 12), strict=True))
    assert loader.skipped == {}
    with pytest.raises(FileNotFoundError, match=r"no shard matches s3://bucket/other/\*.tar"):
        opened("s3://bucket/other/")


# ---- an S3 server


@pytest.fixture(scope="module")
def s3():
    """moto's S3 server, with a bucket; and boto3's client of it."""
    with pytest.MonkeyPatch.context() as patch:
        made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        made.start()
        host, port = made.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "word")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
        made.stop()


@pytest.mark.parametrize(("name", "workers"), [("pairs/", 0), ("pairs/*.tar", 0), ("pairs/{0..2}.tar", 2)])
def test_shards_of_an_s3_server_give_the_pairs_of_the_folder(s3, server, tmp_path, name, workers):
    for path in server.folder.glob("*.tar"):
        s3.upload_file(str(path), "bucket", f"pairs/{path.name}")
    settings = {"workers": workers, "shuffle_buffer": 7, "cache_mib": 0}
    loader = opened(f"s3://bucket/{name}", 4, remote=kept(tmp_path), **settings)
    local = opened(server.folder, 4, **settings)
    assert all(same(a, b) for a, b in zip(take(loader, 20), take(local, 20), strict=True))
    assert loader.skipped == {}
    assert {hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "kept").glob("*.tar")} == {
        hashlib.sha256(path.read_bytes()).digest() for path in server.folder.glob("*.tar")
    }
    for each in (loader, local):
        each.close()


def test_what_an_s3_server_does_not_have_is_named(s3, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of the first 1 of 1 shards can be read: s3://other/0.tar: "):
        opened("s3://other/0.tar", remote=HASTY)
    with pytest.raises(FileNotFoundError, match=r"no shard matches s3://bucket/none/\*.tar"):
        opened("s3://bucket/none/", remote=HASTY)


# ---- kept on disk


def kept(tmp_path, **more):
    return Remote(retries=2, pause_s=0.01, cache_dir=str(tmp_path / "kept"), **more)


def test_a_kept_shard_is_fetched_once_and_read_without_its_server(server, tmp_path):
    source, how = server.address + "/{0..2}.tar", kept(tmp_path)
    loader = opened(source, 4, remote=how)
    batches = take(loader, 20)
    probes = 1  # when the source is opened
    assert server.gets.total() == 3 + probes
    server.stop()
    again = opened(source, 4, remote=how)
    assert all(same(a, b) for a, b in zip(batches, take(again, 20), strict=True))
    names = {path.name.partition("-")[2] for path in (tmp_path / "kept").iterdir() if path.suffix == ".tar"}
    assert names == {"0.tar", "1.tar", "2.tar"}


def test_many_readers_at_once_fetch_a_shard_once(server, tmp_path):
    content = os.urandom(2**21)
    (server.folder / "x.tar").write_bytes(content)
    with ThreadPoolExecutor(8) as pool:
        read_by_each = list(pool.map(lambda _: read(f"{server.address}/x.tar", kept(tmp_path)), range(16)))
    assert {hashlib.sha256(data).digest() for data in read_by_each} == {hashlib.sha256(content).digest()}
    assert server.gets["x.tar"] == 1


def test_a_shard_that_broke_off_is_not_kept(server, tmp_path):
    server.failures["0.tar"] = ["cut"] * 50
    server.ranges = False
    with pytest.raises((aiohttp.ClientError, ValueError)):
        read(f"{server.address}/0.tar", kept(tmp_path))
    assert [path for path in (tmp_path / "kept").iterdir() if not path.name.startswith(".")] == []


def test_the_least_recently_used_shards_make_room(server, tmp_path):
    size = (server.folder / "0.tar").stat().st_size
    how = kept(tmp_path, cache_gib=2.5 * size / 2**30)
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "old.tar.1-2.partial").write_bytes(b"left by a kill")
    os.utime(folder / "old.tar.1-2.partial", (0, 0))
    (folder / "new.tar.1-2.partial").write_bytes(b"being written")
    held = open_shard(f"{server.address}/0.tar", how)
    for name in ("1", "0", "2"):  # 1 is used before 0
        read(f"{server.address}/{name}.tar", how)
        time.sleep(0.02)
    names = {path.name.partition("-")[2] for path in folder.glob("*.tar")}
    assert names == {"0.tar", "2.tar"}
    read(f"{server.address}/1.tar", how)
    assert {path.name.partition("-")[2] for path in folder.glob("*.tar")} == {"2.tar", "1.tar"}
    assert held.read() == (server.folder / "0.tar").read_bytes()  # removed while it was being read
    held.close()
    assert [path.name for path in folder.glob("*.partial")] == ["new.tar.1-2.partial"]


def test_a_shard_larger_than_the_cache_is_read_without_being_kept(server, tmp_path):
    how = kept(tmp_path, cache_gib=1000 / 2**30)
    for _ in range(2):
        assert read(f"{server.address}/0.tar", how) == (server.folder / "0.tar").read_bytes()
    assert server.gets["0.tar"] == 2
    assert list((tmp_path / "kept").glob("*.tar")) == []


def test_a_full_disk_is_no_reason_to_stop(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.shutil, "copyfileobj", full)
    assert read(f"{server.address}/0.tar", kept(tmp_path)) == (server.folder / "0.tar").read_bytes()
    assert list((tmp_path / "kept").glob("*.tar")) == []
