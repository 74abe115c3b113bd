"""A Hub of one repository on loopback, enough of its routes for huggingface_hub's client."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Serves `folder` as the repository `repo`; `status` other than 200 answers every request so.

    `requests` records (method, path, Range header), in order. `break_after` closes the connection
    once, after that many bytes of a file that has more.
    """

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.status, self.error_code = 200, ""
        self.break_after: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "StandIn":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> list[str]:
        return sorted(
            str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()
        )

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of the downloads of one file, in order."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status != 200:
            self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code}, body)
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": f,
                    "size": (hub.folder / f).stat().st_size,
                    "oid": "0" * 40,
                }
                for f in hub.files()
            ]
            self.send(200, json.dumps(entries).encode(), {}, body)
        elif path.startswith(f"/api/models/{hub.repo}"):
            siblings = [{"rfilename": f} for f in hub.files()]
            facts = {"id": hub.repo, "sha": COMMIT, "siblings": siblings, "private": False}
            self.send(200, json.dumps(facts).encode(), {}, body)
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self.file(hub.folder / path.split("/resolve/")[1].split("/", 1)[1], body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            return
        data = path.read_bytes()
        head = {
            "ETag": f'"{path.name}-{len(data)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = self.headers.get("Range", "").removeprefix("bytes=").split("-")[0]
        if start:
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(206, data[int(start) :], head, body)
        else:
            self.send(200, data, head, body)

    def send(self, status: int, data: bytes, head: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            limit = self.hub.break_after if head.get("Accept-Ranges") else None
            if limit is not None and len(data) > limit:
                self.hub.break_after = None
                self.close_connection = True
                data = data[:limit]
            self.wfile.write(data)
