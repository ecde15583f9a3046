"""Photos on disk are read whole and from under the root only, or the error says why not."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.photos.files import RETRY_S, FileStat, PhotoError, PhotoFolder, check_image_root
from pipeline.stage.errors import DataError, StorageError

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one photo two folders down, and a secret beside the root."""
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "root" / "7" / "a").mkdir(parents=True)
    (tmp_path / "root" / "7" / "a" / "0.jpg").write_bytes(b"photo")
    return tmp_path / "root"


def folder(
    root: Path,
    follow_symlinks: bool = False,
    max_bytes: int = 100,
    pauses: tuple[float, ...] = RETRY_S,
) -> PhotoFolder:
    return PhotoFolder(root, follow_symlinks, max_bytes, pauses)


def error_of(photos: PhotoFolder, storage_path: str | None) -> str:
    """The one error that stat() and read() both give."""
    messages = []
    for method in (photos.stat, photos.read):
        with pytest.raises(PhotoError) as caught:
            method(storage_path)
        messages.append(str(caught.value))
        assert messages[-1].startswith(f"{caught.value.reason}: ")
        assert str(photos.root) not in messages[-1]
    assert messages[0] == messages[1]
    return messages[0]


def test_a_file_comes_with_its_bytes_and_its_state(root: Path) -> None:
    """read() gives the bytes and the state, and stat() the same state."""
    os.utime(root / "7/a/0.jpg", ns=(5, 1_700_000_000_123_456_789))

    expected = FileStat(5, 1_700_000_000_123_456_789)
    assert (b"photo", expected) == folder(root).read("7/a/0.jpg")
    assert expected == folder(root).stat("7/a/0.jpg")


@pytest.mark.parametrize("path", ["7/a/0.jpg", "./7//a/./0.jpg", "7/a/0.jpg/"])
@pytest.mark.parametrize("follow_symlinks", [False, True])
def test_empty_and_dot_parts_count_for_nothing(
    root: Path, path: str, follow_symlinks: bool
) -> None:
    """However its steps are written, a path names the same photo."""
    assert folder(root, follow_symlinks).read(path)[0] == b"photo"


@pytest.mark.parametrize("follow_symlinks", [False, True])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "outside: the storage_path is empty"),
        ("/etc/passwd", "outside: the storage_path is absolute"),
        ("../secret.jpg", "outside: the storage_path holds '..'"),
        ("7/../7/a/0.jpg", "outside: the storage_path holds '..'"),
        ("7/a/..", "outside: the storage_path holds '..'"),
        ("7/a/0.jpg\0.png", "outside: the storage_path holds a NUL"),
        ("7/\udcff.jpg", "outside: the storage_path is not UTF-8"),
        ("x" * 10_000, "outside: the storage_path is longer than 4095 bytes"),
        ("x/" * 5_000, "outside: the storage_path is longer than 4095 bytes"),
        ("x" * 300, "outside: the storage_path has too long a name"),
        ("..\\secret.jpg", "missing: no such file"),
        ("7/a/1.jpg", "missing: no such file"),
        ("8/a/0.jpg", "missing: no such file"),
        ("7/a/0.jpg/x.jpg", "missing: no such file"),
        (None, "missing: the row has no storage_path"),
        ("7/a", "unreadable: a folder, not a file"),
        (".", "unreadable: a folder, not a file"),
    ],
)
def test_a_path_that_is_no_photo_is_that_rows_error(
    root: Path, path: str | None, message: str, follow_symlinks: bool
) -> None:
    """Each way to name no photo has its reason, which stat() and read() agree on."""
    assert message == error_of(folder(root, follow_symlinks), path)


LINKS = [
    ("7/a/out.jpg", "../../../secret.jpg"),
    ("7/a/in.jpg", "0.jpg"),
    ("up", ".."),
    ("7/b", "a"),
    ("7/a/dangling.jpg", "nowhere.jpg"),
]


@pytest.mark.parametrize(
    "path", ["7/a/out.jpg", "7/a/in.jpg", "up/secret.jpg", "7/b/0.jpg", "7/a/dangling.jpg"]
)
def test_no_symlink_is_followed_by_default(root: Path, path: str) -> None:
    """A symlink at any step below the root is refused, wherever it leads."""
    for name, target in LINKS:
        (root / name).symlink_to(target)

    assert "outside: a symlink, and follow_symlinks is off" == error_of(folder(root), path)


def test_symlinks_are_followed_on_request(root: Path) -> None:
    """With follow_symlinks they lead anywhere, and a dangling one is a missing photo."""
    for name, target in LINKS:
        (root / name).symlink_to(target)
    (root / "loop").symlink_to("loop")
    photos = folder(root, follow_symlinks=True)

    assert b"secret" == photos.read("7/a/out.jpg")[0]
    assert b"secret" == photos.read("up/secret.jpg")[0]
    assert b"photo" == photos.read("7/b/0.jpg")[0]
    assert "missing: no such file" == error_of(photos, "7/a/dangling.jpg")
    assert error_of(photos, "loop").startswith("unreadable: ")


def test_the_root_itself_may_be_a_symlink(root: Path) -> None:
    """Only what lies below the root is a stranger's."""
    root.with_name("link").symlink_to(root)

    assert b"photo" == folder(root.with_name("link")).read("7/a/0.jpg")[0]


def test_a_relative_root_survives_a_change_of_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root is fixed when the folder is made."""
    monkeypatch.chdir(root.parent)
    photos = folder(Path("root"))
    monkeypatch.chdir("/")

    assert b"photo" == photos.read("7/a/0.jpg")[0]


def test_a_swapped_folder_never_leads_out(root: Path) -> None:
    """While a folder is swapped for a symlink over and over, no read leaves the root."""
    inside, outside = root / "7" / "a", root.parent / "outside"
    outside.mkdir()
    (outside / "0.jpg").write_bytes(b"secret")
    photos, stop, seen = folder(root), threading.Event(), set()

    def swap() -> None:
        while not stop.is_set():
            inside.rename(root / "7" / "aside")
            inside.symlink_to(outside)
            inside.unlink()
            (root / "7" / "aside").rename(inside)

    swapper = threading.Thread(target=swap)
    swapper.start()
    for _ in range(3000):
        try:
            seen.add(photos.read("7/a/0.jpg")[0].decode())
        except PhotoError as error:
            seen.add(error.reason)
    stop.set()
    swapper.join()

    assert seen <= {"photo", "missing", "outside"}


def test_a_fifo_does_not_hang(root: Path) -> None:
    """A FIFO without a writer is an error at once."""
    os.mkfifo(root / "pipe.jpg")

    assert "unreadable: a FIFO, not a file" == error_of(folder(root), "pipe.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(root: Path) -> None:
    """Permission is the photo's own error, of the file as of a folder on the way."""
    (root / "7/a/0.jpg").chmod(0)
    assert "unreadable: permission denied" == error_of(folder(root), "7/a/0.jpg")

    (root / "7").chmod(0)
    try:
        assert "unreadable: permission denied" == error_of(folder(root), "7/a/0.jpg")
    finally:
        (root / "7").chmod(0o755)


# What a network file system, a failing disk or a process without descriptors answers.
OUTAGES = [
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.ECONNRESET, errno.ENOTCONN, errno.EREMOTEIO, errno.ESHUTDOWN,
    errno.EBUSY, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, None,
]  # fmt: skip


@pytest.mark.parametrize("number", OUTAGES)
@pytest.mark.parametrize("call", ["open", "fstat", "read"])
def test_an_outage_is_no_photos_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int | None
) -> None:
    """A file system that keeps failing ends the stage in a line that names the photo."""
    asked: list[str] = []
    photos = folder(root, pauses=(0.0, 0.0))

    def fail(*args: object, **kwargs: object) -> None:
        asked.append(call)
        raise OSError(number, "failed", "/a/path") if number else OSError("failed")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError) as error:
        photos.read("7/a/0.jpg")
    monkeypatch.undo()

    words = os.strerror(number).lower() if number else "input/output error"
    assert (
        f"expected photos that can be read, found {words} (7/a/0.jpg); hint: run it again when the"
        " disk or network answers: nothing that was encoded is lost; a photo that fails each time"
        " can be moved away"
    ) == str(error.value)
    assert [call] * 3 == asked


@pytest.mark.parametrize(
    "number",
    [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
     errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.ENODEV],
)  # fmt: skip
@pytest.mark.parametrize("follow_symlinks", [False, True])
def test_an_answer_about_the_path_is_the_photos_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, follow_symlinks: bool
) -> None:
    """What is wrong with one name is not asked again and costs that photo only."""
    asked: list[object] = []

    def fail(path: object, *args: object, **kwargs: object) -> None:
        asked.append(path)
        raise OSError(number, "failed")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(PhotoError):
        folder(root, follow_symlinks).stat("7/a/0.jpg")

    assert 1 == len(asked)


@pytest.mark.parametrize("call", ["open", "fstat", "read"])
def test_a_moment_of_trouble_costs_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A file system that answers when it is asked again gives the photo, whole."""
    failures = [errno.ESTALE, errno.ETIMEDOUT]
    original = getattr(os, call)

    def recovering(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise OSError(failures.pop(), "failed")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, recovering)

    assert b"photo" == folder(root, pauses=(0.0, 0.0)).read("7/a/0.jpg")[0]
    assert [] == failures


def test_an_outage_names_no_escape_sequence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that is shown is a stranger's: printable, and not endless."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError) as error:
        folder(root, pauses=()).stat("\x1b[31m/" + "long" * 99)

    assert "(?[31m/longlong" in str(error.value)
    assert 500 > len(str(error.value))


def test_a_name_that_is_taken_is_there(root: Path) -> None:
    """A photo is there be it too large, a link or a folder; not when it is missing."""
    (root / "large.jpg").write_bytes(b"x" * 101)
    (root / "link.jpg").symlink_to("large.jpg")
    photos = folder(root)

    assert [True] * 4 == [
        photos.has_any([None, "8.jpg", path])
        for path in ("7/a/0.jpg", "large.jpg", "link.jpg", "7")
    ]
    assert [False] * 2 == [photos.has_any(paths) for paths in ([], [None, "8.jpg", "7/b/0.jpg"])]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_seen_is_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without permission nobody can tell a photo from a wrong root."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, "failed")

    monkeypatch.setattr(os, "open", fail)

    assert not folder(root).has_any(["7/a/0.jpg"])


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (errno.ENOENT, "none"),
        (errno.ESTALE, "stale file handle"),
        (errno.EHOSTDOWN, "host is down"),
    ],
)
def test_a_root_that_fails_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, found: str
) -> None:
    """Whatever the file system answers for the root itself, the line says it."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, "failed")

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(DataError) as error:
        check_image_root(root)

    assert (
        f"expected a folder of images at IMAGE_ROOT_DIR, found {found} ({root});"
        " hint: export IMAGE_ROOT_DIR=/path/to/images"
    ) == str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter everything")
def test_a_root_that_may_not_be_entered_is_one_line(root: Path) -> None:
    """A root without permission is the root's fault, not that of each photo."""
    root.chmod(0o600)
    try:
        with pytest.raises(DataError, match="found one that may not be entered"):
            check_image_root(root)
    finally:
        root.chmod(0o755)


def test_a_large_file_is_refused_unread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """max_bytes itself is allowed; one more is an error before any byte is read."""
    (root / "most.jpg").write_bytes(b"x" * 100)
    (root / "more.jpg").write_bytes(b"x" * 101)
    assert 100 == len(folder(root).read("most.jpg")[0])

    monkeypatch.setattr(os, "read", None)
    assert "too-large: 101 bytes, more than the 100 allowed" == error_of(folder(root), "more.jpg")


def test_an_empty_file_is_read(root: Path) -> None:
    """No bytes are bytes: what they show is for the decoder to say."""
    (root / "empty.jpg").touch()

    assert b"" == folder(root).read("empty.jpg")[0]


def changing(path: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `path` grow by one byte before each of the first reads; the sizes that were asked for."""
    asked: list[int] = []
    read = os.read

    def growing(fd: int, n: int) -> bytes:
        if len(asked) < times:
            with path.open("ab") as file:
                file.write(b"!")
        asked.append(n)
        return read(fd, n)

    monkeypatch.setattr(os, "read", growing)
    return asked


def test_a_file_that_changed_once_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reading is whole, and the state is that of the second."""
    changing(root / "7/a/0.jpg", 1, monkeypatch)

    data, state = folder(root).read("7/a/0.jpg")
    assert (b"photo!", 6) == (data, state.size)


def test_a_file_that_keeps_changing_is_unreadable(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file never counts as a photo, and little more than its size is ever read."""
    asked = changing(root / "7/a/0.jpg", 99, monkeypatch)

    with pytest.raises(PhotoError, match="^unreadable: the file changed while it was read$"):
        folder(root).read("7/a/0.jpg")
    assert 8 >= max(asked)


def test_a_file_that_shrank_is_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes than the size said are not the photo."""
    monkeypatch.setattr(os, "read", lambda fd, n: b"")

    with pytest.raises(PhotoError, match="^unreadable: the file changed while it was read$"):
        folder(root).read("7/a/0.jpg")


def test_no_descriptor_is_left_open(root: Path) -> None:
    """Neither photos nor errors use up descriptors."""
    (root / "link").symlink_to("7")
    os.mkfifo(root / "7" / "pipe.jpg")
    photos = folder(root)
    before = len(os.listdir("/proc/self/fd"))
    for path in [
        "7/a/0.jpg",
        "7/a/1.jpg",
        "link/a/0.jpg",
        "7/pipe.jpg",
        "7/a",
        "..",
        "7/a/0.jpg/x",
    ]:
        with contextlib.suppress(PhotoError):
            photos.read(path)

    assert before == len(os.listdir("/proc/self/fd"))


def test_an_error_is_one_short_printable_line() -> None:
    """Whatever a detail holds, the message is bounded, printable and always the same."""
    error = PhotoError("broken", "<X object at 0x7f00aa>\n\x1b[31m\udc80" + "long " * 99)

    assert 200 == len(str(error))
    assert str(error).startswith("broken: <X object> ?[31m?long long ")


def test_reading_needs_no_torch() -> None:
    """Listing stages may look at photo files without paying for an encoder's imports."""
    code = "import sys, pipeline.photos.files; sys.exit('torch' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
