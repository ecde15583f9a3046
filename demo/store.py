"""An object store on this machine: moto's S3 server, in memory, and gone with its process.

For the demo, the tests and a benchmark, which can have it answer late or wrongly. As a command, it
serves the files of a folder until its standard input ends, and says where on standard output.
"""

import logging
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from obstore.store import S3Store
from werkzeug.serving import make_server

from pipeline.stage import command

BUCKET = "photos"
REGION = "us-east-1"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class Server:
    """A running store."""

    address: str

    @property
    def variables(self) -> dict[str, str]:
        """What leads there, for the environment of who reads. Any credentials will do."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
        }

    def bucket(self, name: str = BUCKET) -> S3Store:
        """A bucket to write into, made where there is none."""
        made = urllib.request.Request(f"{self.address}/{name}", data=b"", method="PUT")
        with urllib.request.urlopen(made, timeout=60):
            return S3Store(
                name, endpoint=self.address, region=REGION, access_key_id="demo",
                secret_access_key="demo", client_options={"allow_http": True},
            )  # fmt: skip

    def upload(self, folder: Path, names: Iterable[str]) -> str:
        """Put those of the files below a folder that are there; returns the URL to read from."""
        store = self.bucket()
        for name in names:
            if (folder / name).is_file():
                store.put(name, (folder / name).read_bytes())
        return f"s3://{BUCKET}"


@contextmanager
def serving(through: Callable[[Application], Application] = lambda app: app) -> Iterator[Server]:
    """A store while the block runs; each request goes `through` what may delay or spoil it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = through(DomainDispatcherApplication(create_backend_app))
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    server.daemon_threads = True  # type: ignore[attr-defined]  # none is waited for at the end
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=Path, help="whose files to serve")
    parser.add_argument("--late-s", type=float, default=0.0, help="seconds that a request waits")
    args = parser.parse_args()

    def late(application: Application) -> Application:
        def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            time.sleep(args.late_s if request["REQUEST_METHOD"] != "PUT" else 0)
            return application(request, start)

        return answer

    with serving(late) as server:
        below = args.folder.rglob("*")
        server.upload(args.folder, sorted(str(path.relative_to(args.folder)) for path in below))
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    command.run(main, "store")
