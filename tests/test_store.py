from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import RecipeError, StoreError
from scanloom.store import Store
from tests.fault_proxy import Fault, FaultProxy


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("store_uri"))


@pytest.fixture
def proxy(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


# --- what every store does ------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_whole_and_in_ranges(store: Store) -> None:
    data = os.urandom(3 << 20)
    store.write("deep/er/x.bin", data)
    assert store.read("deep/er/x.bin") == data
    assert store.read_range("deep/er/x.bin", 1_000_000, 7) == data[1_000_000:1_000_007]
    assert store.read_range("deep/er/x.bin", 5, 0) == b""
    assert store.digest("deep/er/x.bin")[1:] == (len(data), hashlib.sha256(data).hexdigest())


def test_a_write_replaces(store: Store) -> None:
    store.write("x", b"long old content")
    store.write("x", b"new")
    assert store.read("x") == b"new"


def test_names_of_a_folder_come_page_by_page_and_none_from_below(store: Store) -> None:
    ids = [f"{number:03d}" for number in range(25)]
    for name in ids:
        store.write(f"orders/{name}/order.json", b"{}")
    store.write("orders/010/dataset/images/deep", b"x")
    store.write("orders/note", b"x")
    names = [f"{name}/" for name in ids] + ["note"]
    assert store.names("orders") == names
    assert store.names("orders", limit=4) == names[:4]
    assert store.names("orders", "009/", 4) == names[10:14]
    assert store.names("orders", "0095", 2) == names[10:12]
    assert store.names("orders", "note") == []
    assert store.names("orders/010") == ["dataset/", "order.json"]
    assert store.names("elsewhere") == []
    assert store.names() == ["orders/"]


@pytest.mark.s3
def test_names_beyond_what_a_server_tells_at_once_come_in_order(store_uri: str) -> None:
    store = Store(store_uri)
    names = [f"{number:04d}" for number in range(1203)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write(f"many/{name}", b""), names))
    assert store.names("many", limit=2000) == names
    assert store.names("many", "0100", 1100) == names[101:1201]


def test_a_missing_object_is_named(store: Store) -> None:
    for ask in (store.read, store.digest, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(StoreError, match=rf"{store.uri}/not/here: no such") as caught:
            ask("not/here")
        assert not caught.value.retryable
    assert not store.exists("not/here")


def test_a_range_beyond_the_end_is_refused_not_shortened(store: Store) -> None:
    store.write("x", b"12345")
    for offset in (3, 30):
        with pytest.raises(StoreError, match="shorter than the range"):
            store.read_range("x", offset, 9)


def test_create_keeps_the_first_and_accepts_its_own_bytes_again(store: Store) -> None:
    assert store.create("c", b"first")
    assert not store.create("c", b"second")
    assert store.create("c", b"first")
    assert store.read("c") == b"first"


def test_one_of_many_rivals_creates(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.create("one", b"rival %d" % i), range(8)))
    assert sum(won) == 1
    assert store.read("one") == b"rival %d" % won.index(True)


def test_a_listing_is_recursive_sorted_and_relative(store: Store) -> None:
    keys = ["a/b", "a-b/x", "a/b.c/d", "z", "a.b"]
    below = store.at("below")
    for key in keys:
        below.write(key, key.encode())
    store.write("elsewhere", b"")
    assert [(o.key, o.bytes) for o in below.list()] == [(key, len(key)) for key in sorted(keys)]
    assert [o.key for o in below.list("a")] == [o.key for o in below.list("a/")] == ["a/b", "a/b.c/d"]
    assert [o.key for o in store.list("below/a")] == ["below/a/b", "below/a/b.c/d"]
    assert store.list("nothing/here") == []


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    for key in ("open.dcm", "closed/one.dcm"):
        Store(str(tmp_path)).write(key, b"scan")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # the tests may run as root, who may read everything
    with pytest.raises(StoreError, match="permission denied"):
        Store(str(tmp_path)).list()


def test_a_listing_leaves_out_directory_markers_and_probes(store: Store) -> None:
    store.filesystem.create_dir(store.path("marker"), recursive=True)
    store.require_writable()
    store.write("marker/.scanloom-half", b"")
    assert store.list() == []


def test_deleting_takes_the_named_objects_and_ignores_absent_ones(store: Store) -> None:
    store.write("a", b"")
    store.write("b", b"")
    store.delete(["a", "never/there"])
    assert [o.key for o in store.list()] == ["b"]


def test_a_folder_goes_up_and_comes_back_equal(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    contents = {"top.json": b"{}", "unet/weights.bin": os.urandom(3 << 20), "unet/empty": b""}
    for name, data in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    put = store.put_folder(source, "model")
    assert {f.key: (f.bytes, f.sha256) for f in put} == {
        f"model/{name}": (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }
    store.fetch_folder("model", tmp_path / "back")
    back = {p.relative_to(tmp_path / "back").as_posix(): p for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in back.items()} == contents


def test_fetching_a_folder_that_is_not_there_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no objects there"):
        store.fetch_folder("model", tmp_path / "back")


def test_pyarrow_opens_the_same_object(store: Store) -> None:
    store.write("x", b"hello")
    with store.filesystem.open_input_stream(store.path("x")) as stream:
        assert stream.read() == b"hello"


def test_a_store_is_its_uri(store: Store) -> None:
    assert pickle.loads(pickle.dumps(store)) == store == Store(store.uri + "/")
    assert store.at("a/b") == Store(store.uri_of("a/b"))


@pytest.mark.parametrize("key", ["../up", "/top", "a//b", "a/./b", "a/"])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="key"):
        store.write(key, b"")


# --- naming a store -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["", "gs://bucket/x", "s3://", "s3://Bad_Bucket/x", "s3://b/x", "s3:///x"])
def test_a_uri_that_is_no_store_is_a_recipe_error(uri: str) -> None:
    with pytest.raises(RecipeError, match="store"):
        Store(uri)


def test_local_spellings_name_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("a b") == Store(str(tmp_path / "a b")) == Store(f"file://{tmp_path}/a%20b")
    assert Store("s3://bucket/x/") == Store("s3://bucket/x")


# --- a local folder that fails --------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_disk: Path) -> None:
    store = Store(str(tiny_disk))
    store.write("old", b"kept")
    for act in (store.write, store.create):
        with pytest.raises(StoreError, match="the disk is full"):
            act("old" if act == store.write else "new", bytes(1 << 20))
    assert [(o.key, o.bytes) for o in store.list()] == [("old", 4)]
    assert os.listdir(tiny_disk) == ["old"]  # noqa: PTH208 - hidden files too


def test_a_read_only_disk_is_refused_before_work_starts(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StoreError, match="read-only"):
        Store(str(tiny_disk / "out")).require_writable()


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        Store(str(tmp_path / "file" / "out")).require_writable()


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    with pytest.raises(StoreError, match=r"^/proc/out: cannot be created there"):
        Store("/proc/out").require_writable()


def test_a_local_file_has_no_presigned_url(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no presigned URL"):
        Store(str(tmp_path)).presign("x", 60)


# --- an S3 server that refuses --------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "refused the credentials .*AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "refused the credentials .*AWS_ACCESS_KEY_ID"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "no answer from http://127.0.0.1:9 .*AWS_ENDPOINT_URL"),
        ("AWS_ENDPOINT_URL", "no url", "no url.*AWS_"),
    ],
)
def test_a_wrong_environment_is_told_in_one_line(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreError, match=message) as caught:
        Store(store_uri).require_bucket()
    assert store_uri in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.s3
def test_a_refused_upload_of_a_file_is_typed(store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="refused the credentials"):
        Store(store_uri).put("file", tmp_path / "file")


@pytest.mark.s3
def test_no_credentials_at_all_is_told(store_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        Store(store_uri).require_bucket()


@pytest.mark.s3
def test_a_missing_bucket_is_named_by_every_operation(s3: EmbeddedS3) -> None:
    store = Store("s3://nobody-made-it/x")
    for ask in (store.require_bucket, store.require_writable, store.list, lambda: store.read("k")):
        with pytest.raises(StoreError, match="there is no bucket 'nobody-made-it' at http"):
            ask()


@pytest.mark.s3
def test_refused_writes_are_found_before_work_starts(store_uri: str, proxy: FaultProxy) -> None:
    proxy.inject("403", method="PUT")
    Store(store_uri).require_bucket()
    with pytest.raises(StoreError, match=rf"^{store_uri}: these credentials may not do this \(PutObject: AccessDenied"):
        Store(store_uri).require_writable()


@pytest.mark.s3
def test_a_server_that_ignores_conditions_is_found_before_work_starts(store_uri: str, proxy: FaultProxy) -> None:
    proxy.inject("accept", method="PUT", times=2)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        Store(store_uri).require_writable()
    assert Store(store_uri).list() == []


@pytest.mark.s3
def test_a_presigned_url_reads_without_credentials(store_uri: str) -> None:
    store = Store(store_uri)
    store.write("x", b"hello")
    with urllib.request.urlopen(store.presign("x", 60), timeout=5) as answer:
        assert answer.read() == b"hello"


@pytest.mark.s3
def test_more_objects_than_a_page_are_listed_and_deleted(store_uri: str) -> None:
    store = Store(store_uri)
    keys = [f"{i % 7}/{i:04d}" for i in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b""), keys))
    assert [o.key for o in store.list()] == sorted(keys)
    store.delete(keys)
    assert store.list() == []


# --- an S3 server that fails ----------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["503", "429", "reset", "lost_ack"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_request_that_fails_is_repeated(store_uri: str, proxy: FaultProxy, fault: Fault, method: str) -> None:
    store = Store(store_uri)
    proxy.inject(fault, method=method)
    store.write("x", b"hello")
    assert store.read("x") == b"hello"
    assert proxy.injected == [fault]


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["truncate", "corrupt"])
def test_a_body_that_breaks_is_read_again(store_uri: str, proxy: FaultProxy, tmp_path: Path, fault: Fault) -> None:
    store, data = Store(store_uri), os.urandom(3 << 20)
    store.write("folder/x", data)
    proxy.inject(fault, method="GET", path="folder/x", times=1, at=2_000_000)
    assert store.read("folder/x") == data
    proxy.inject(fault, method="GET", path="folder/x", times=1, at=2_000_000)
    store.fetch_folder("folder", tmp_path)
    assert (tmp_path / "x").read_bytes() == data
    proxy.inject(fault, method="GET", path="folder/x", times=1, at=2_000_000)
    assert store.digest("folder/x").sha256 == hashlib.sha256(data).hexdigest()
    assert proxy.injected == [fault] * 3


@pytest.mark.s3
def test_a_range_and_a_listing_that_break_are_read_again(store_uri: str, proxy: FaultProxy) -> None:
    store = Store(store_uri)
    store.write("x", b"hello world")
    proxy.inject("truncate", method="GET", at=3)
    assert store.read_range("x", 1, 9) == b"ello worl"
    proxy.inject("truncate", method="GET", path="list-type", at=40)
    assert [o.key for o in store.list()] == ["x"]
    assert proxy.injected == ["truncate"] * 2


@pytest.mark.s3
def test_a_lost_acknowledgement_does_not_make_us_lose_our_own_create(store_uri: str, proxy: FaultProxy) -> None:
    store = Store(store_uri)
    proxy.inject("lost_ack", method="PUT")
    assert store.create("c", b"ours")
    assert not store.create("c", b"theirs")
    assert proxy.injected == ["lost_ack"]


@pytest.mark.s3
def test_a_server_that_stays_overloaded_is_a_retryable_error(store_uri: str, proxy: FaultProxy) -> None:
    proxy.inject("503", times=3)
    with pytest.raises(StoreError, match="overloaded or failing") as caught:
        Store(store_uri).require_bucket()
    assert caught.value.retryable


def test_folders_behind_links_are_listed_once_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "scan").write_bytes(b"1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert [found.key for found in Store(str(tmp_path / "in")).list()] == ["link/deep/scan"]


@pytest.mark.s3
def test_a_key_that_is_no_path_is_read_as_the_bucket_lists_it(store_uri: str) -> None:
    bucket, _, prefix = store_uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=f"{prefix}/a//b", Body=b"scan")
    store = Store(store_uri)
    [found] = store.list()
    assert store.read(found.key) == store.read_range(found.key, 0, found.bytes) == b"scan"
    assert store.uri_of(found.key).startswith(store_uri)
