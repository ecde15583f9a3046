"""Photos in an object store (s3://, gs://, az://) or on a web server (https://), by `obstore`.

Reads objects below the image root's prefix only, with the guarantees of files.py: never more bytes
than allowed, never half of an object that is being replaced; a store that fails is no photo's
error. Of the library's own errors no text is passed on: they quote requests and answers, and what
these say of credentials belongs in no log.
"""

import os
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipeline.photos.files import RETRY_S, FileStat, PhotoError, Photos, parts_of, printable
from pipeline.stage.errors import SettingsError, StorageError

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

T = TypeVar("T")

REQUESTS = 64  # under way at a time: at 200 ms each, 320 photos a second
PAGE = 1000  # objects in an answer to a list
NAME_LENGTH = 1024  # bytes of an object's whole name, in each of the stores

# The library's own: no end to a silence, and three minutes of retries.
_CLIENT: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=10),
    "timeout": timedelta(minutes=2),
    "allow_http": True,  # where an endpoint says so
}
_PATIENT: "RetryConfig" = {"max_retries": 10, "retry_timeout": timedelta(seconds=60)}
_HASTY: "RetryConfig" = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}


class _Terms(NamedTuple):
    """What a kind of store calls what may be wrong with it."""

    place: str
    credentials: str
    rights: str
    variables: tuple[str, ...] = ()  # how those begin that are put into requests as they are


_TERMS = {
    "s3": _Terms(
        "IMAGE_ROOT_DIR, AWS_REGION and AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if they are temporary, AWS_SESSION_TOKEN",
        "s3:GetObject and s3:ListBucket (without that, what is missing is refused, too)",
        ("AWS_",),
    ),
    "gcs": _Terms(
        "IMAGE_ROOT_DIR", "GOOGLE_SERVICE_ACCOUNT", "storage.objects.get and storage.objects.list"
    ),
    "azure": _Terms(
        "IMAGE_ROOT_DIR and AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY",
        "Storage Blob Data Reader", ("AZURE_STORAGE_",),
    ),
}  # fmt: skip
_WEB = _Terms("IMAGE_ROOT_DIR", "a server that asks for none", "a server that lets anyone read")

NO_BUCKET = "NoSuchBucket|ContainerNotFound"

_PANIC = "the library panics"

# Variables that are an address.
_ADDRESS = re.compile(r"AWS_ENDPOINT(_URL(_S3)?)?|AWS_METADATA_ENDPOINT|AZURE_STORAGE_ENDPOINT")

# What an answer means, by the first of these that its text has: found, hint.
_FAULTS = (
    (NO_BUCKET + "|status code: 404",
     "no such bucket", "see {place}"),
    (r"BareRedirect|PermanentRedirect|AuthorizationHeaderMalformed|status code: 30\d",
     "a bucket of another region", "see {place}"),
    (r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|status code: 401"
     r"|AuthenticationFailed",
     "credentials that are refused", "see {credentials}"),
    (r"status code: 403", "no right to it", "it takes {rights}"),
    (r"status code: (429|503)|SlowDown", "a store that asks for fewer requests", "{later}"),
    (r"status code: 5\d\d", "a store that fails", "{later}"),
    (r"status code: 4\d\d", "a request that is refused", "see {place}"),
    (r"/latest/(api|meta-data)|computeMetadata|metadata/identity",
     "no credentials", "export {credentials}"),
    ("InvalidListResponse|Header", "an answer that is no store's", "see {place}"),
    (r"kind: Timeout|TimedOut", "no answer in time", "see {place}; {later}"),
    (r"kind: Connect", "nobody who answers", "see {place}; {later}"),
    (_PANIC, "a request that cannot be made", "see {place}; {credentials}"),
)  # fmt: skip
_LATER = "run it again when the store answers: nothing that was encoded is lost"


class PhotoStore(Photos):
    """A URL as the image root.

    `max_bytes`: a larger object is 'too-large', and its bytes are not fetched. `patient=False`: a
    store that fails is asked again for seconds, not for a minute.

    An object's version is a hash of its etag, or of its date where it has none.
    """

    readers = REQUESTS

    def __init__(self, url: str, max_bytes: int, patient: bool = True) -> None:
        """SettingsError where the library is missing, or takes the URL or its variables for bad."""
        self.root = url.rstrip("/")
        self.max_bytes = max_bytes
        self.pauses = RETRY_S if patient else ()
        self._prefix = len(self.root.partition("://")[2].partition("/")[2].encode())
        self._store, self._terms = _store(self.root, _PATIENT if patient else _HASTY)

    def check(self) -> tuple[int, int]:
        """StorageError where no photo could be told from one that is missing.

        That takes the right bucket, region and credentials and the right to list. Answers as
        PhotoFolder does; here, one URL is one root.
        """
        if self._terms is _WEB:
            self._answers()
        else:
            with suppress(PhotoError):
                self._page()
        return 0, 0

    def stat(self, storage_path: str | None) -> FileStat:
        """As of Photos; by a HEAD."""
        name = self._name(storage_path)
        return self._checked(self._ask(name, lambda: self._store.head(name)))

    def stats(self, storage_paths: Sequence[str | None]) -> Iterator[FileStat | PhotoError]:
        """As of Photos; by lists where that takes fewer requests."""
        listed = self._listed(storage_paths)

        def look(path: str | None) -> FileStat | PhotoError:
            try:
                name = self._name(path)
                if name not in listed:
                    return self.stat(path)
                meta = listed[name]
                return self._checked(meta) if meta else _missing()
            except PhotoError as error:
                return error

        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(look, storage_paths)

    def read(
        self, storage_path: str | None, room: Callable[[int], None] = lambda size: None
    ) -> tuple[bytes, FileStat]:
        """As of Photos; by one GET, which answers with the bytes and their state at once.

        A body that is cut off is gone on with by the library, if the object is the same still.
        """
        name = self._name(storage_path)
        states = []
        for pause in (*self.pauses, None):
            found = self._ask(name, lambda: self._store.get(name))
            states.append(self._checked(found.meta))
            room(states[-1].size)
            try:
                return self._ask(name, found.bytes).to_bytes(), states[-1]
            except StorageError:
                is_ever_another = 1 < len(states) == len(set(states))
                if pause is None and not is_ever_another:
                    raise
            time.sleep(pause or 0.0)
        raise PhotoError("unreadable", "the file changed while it was read")

    def _name(self, storage_path: str | None) -> str:
        """The object's name below the prefix; PhotoError where there can be none."""
        name = b"/".join(parts_of(storage_path))
        if self._prefix + bool(self._prefix) + len(name) > NAME_LENGTH:
            raise PhotoError("outside", "the storage_path has too long a name")
        return name.decode()

    def _checked(self, meta: "ObjectMeta") -> FileStat:
        if meta["size"] > self.max_bytes:
            raise PhotoError(
                "too-large", f"{meta['size']} bytes, more than the {self.max_bytes} allowed"
            )
        return FileStat(meta["size"], _version(meta))

    def _listed(self, storage_paths: Sequence[str | None]) -> "dict[str, ObjectMeta | None]":
        """What lists tell, None: is not there, while each saves as many requests as go at a time.

        A list costs about what twelve requests do, and pages come one after another. S3, Google
        and Azure give names in the order of their bytes, others folder by folder, some in none:
        what a page leaves out is not there if it had to be on it by either order.
        """
        wanted = set()
        for path in storage_paths:
            with suppress(PhotoError):
                wanted.add(self._name(path))
        names = sorted(wanted) if self._terms is not _WEB else []
        found: dict[str, ObjectMeta | None] = {}
        while len(names) >= REQUESTS:
            try:
                listed = self._page(names[0][:-1])
            except (PhotoError, StorageError):
                break  # one by one, then
            page = {each["path"]: each for each in listed}
            times = Counter(each["path"] for each in listed)  # a folder's mark has its photo's name
            parts = {name: name.split("/") for name in [*page, *names]}
            if list(page) not in (sorted(page), sorted(page, key=parts.__getitem__)):
                break
            ended = len(listed) < PAGE
            here = len(names) if ended else bisect_right(names, max(page))
            first, last = parts[names[0]], max((parts[name] for name in page), default=[])
            for name in names[:here]:
                if times[name] < 2 and (
                    name in page or (first <= parts[name] and (ended or parts[name] <= last))
                ):
                    found[name] = page.get(name)
            if here < REQUESTS:
                break
            names = names[here:]
        return found

    def _page(self, after: str = "") -> "Sequence[ObjectMeta]":
        """The first objects whose names come after this one; PhotoError: there are strange ones."""
        objects = self._store.list(offset=after or None, chunk_size=PAGE)
        return self._ask("", lambda: next(objects, []))

    def _answers(self) -> None:
        """A web server has no list, and may refuse its folders: any answer is a good one."""
        from obstore.exceptions import BaseError

        try:
            with _panics():
                self._store.head("")
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            if not re.search("status code: 4|MissingContentLength", str(error)):
                raise self._failure("", error) from None

    def _ask(self, name: str, question: Callable[[], T]) -> T:
        """What the store answers; PhotoError if that is about the object, else StorageError."""
        from obstore.exceptions import BaseError, InvalidPathError

        try:
            with _panics():
                return question()
        except (ValueError, InvalidPathError):
            raise PhotoError("outside", "the storage_path is no name of an object") from None
        except (BaseError, OSError, NotImplementedError) as error:
            failed = error
        if not name or not isinstance(failed, FileNotFoundError):
            raise self._failure(name, failed)
        if re.search(NO_BUCKET, str(failed)):
            self.check()  # which goes on, if only the photo is called so
        raise _missing()

    def _failure(self, name: str, error: Exception) -> StorageError:
        """The error in words of ours, with the store's short ones: a status and a code."""
        said = str(error)
        found, hint = next(
            ((found, hint) for text, found, hint in _FAULTS if re.search(text, said)),
            ("a connection that ends early", "{later}"),
        )
        answer = re.findall(r"status code: (\d{3})|<Code>(\w{1,40})</Code>", said)
        words = dict.fromkeys(filter(None, (word for pair in answer for word in pair)))
        return StorageError(
            "photos that can be read",
            f"{found} ({' '.join(words)})" if words else found,
            printable(f"{self.root}/{name}"),
            hint.format(later=_LATER, **self._terms._asdict()),
        )


def _missing() -> PhotoError:
    return PhotoError("missing", "no such file")


def _version(meta: "ObjectMeta") -> int:
    """A number for the state that an etag stands for, however it is quoted; 63 bits."""
    tag = meta["e_tag"] or meta["last_modified"].isoformat()
    digest = sha256(tag.removeprefix("W/").strip('"').encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@contextmanager
def _panics() -> Iterator[None]:
    """What the library holds for impossible, and so no exception of Python's, is an OSError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise OSError(_PANIC) from None


def _store(url: str, retries: "RetryConfig") -> "tuple[ObjectStore, _Terms]":
    try:
        from obstore import parse_scheme
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise SettingsError(
            "the package obstore, for an IMAGE_ROOT_DIR that is a URL", "none", url,
            "pip install 'obstore>=0.11,<1'",
        ) from None  # fmt: skip
    terms = _WEB
    try:
        terms = _TERMS.get(parse_scheme(url), _WEB)  # also of a cloud's https:// address
        _check_variables(terms)
        return from_url(url, client_options=_CLIENT, retry_config=retries), terms
    except (BaseError, ValueError) as error:
        kind = re.search(r"source: (\w+)", str(error))
        raise SettingsError(
            "a URL and variables that lead to a store",
            kind[1] if kind else type(error).__name__, url,
            f"see {terms.place}; {terms.credentials}",
        ) from None  # fmt: skip


def _check_variables(terms: _Terms) -> None:
    """SettingsError where one can be in no request: the library would panic."""
    for name, value in os.environ.items():
        if not name.startswith(terms.variables):
            continue
        if not value.isprintable():
            raise SettingsError(
                f"{name}: a value of one line", "a line break or another control character",
                "environment", "a file with Windows' line ends leaves one in each value",
            )  # fmt: skip
        if _ADDRESS.fullmatch(name) and not re.match(r"https?://[^/]", value):
            raise SettingsError(
                f"{name}: an address that begins with https:// or http://", "another value",
                "environment", "set it, or unset it for the cloud's own",
            )  # fmt: skip
