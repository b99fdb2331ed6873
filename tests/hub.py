"""A tiny Hub on this machine: serves folders as repositories to huggingface_hub.

    with hub.Hub({"models/owner/bert": folder}) as served:
        ...  # the client asks served.url, which is given to it as HF_ENDPOINT

Each repository has one commit and no branches: whatever revision is asked for is that.
"""

import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As in /api/models/owner/name/tree/main/folder or /owner/name/resolve/main/file.
ADDRESS = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>[^/]+/[^/]+)"
    r"(/(?P<verb>revision|tree|resolve)/[^/]+)?(/(?P<path>.+))?"
)


class Hub(http.server.ThreadingHTTPServer):
    """Answers on a free port for as long as its context lasts.

    Args:
        repositories: Folders by models/owner/name or datasets/owner/name.
        is_gated: Whether it tells of its repositories, but gives none of their files.
        is_broken: Whether it answers each request with an error.

    Attributes:
        requests: All that it was asked, as "GET /api/models/owner/name".
    """

    def __init__(
        self,
        repositories: dict[str, str],
        is_gated: bool = False,
        is_broken: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = repositories
        self.is_gated = is_gated
        self.is_broken = is_broken
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.05]).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        url = urllib.parse.urlsplit(self.path)
        asked = ADDRESS.fullmatch(urllib.parse.unquote(url.path))
        if self.server.is_broken:
            self.refuse(503, "Broken", "This Hub is broken")
            return
        name = asked and (asked["kind"] or "models/") + asked["name"]
        if name not in self.server.repositories:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return
        root = pathlib.Path(self.server.repositories[name])
        path = root / (asked["path"] or "")
        if asked["verb"] == "resolve" and self.server.is_gated:
            self.refuse(403, "GatedRepo", f"Access to {asked['name']} is restricted")
        elif not path.exists():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif asked["verb"] == "resolve":
            content = path.read_bytes()
            self.send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        elif asked["verb"] == "tree":
            is_deep = "recursive=true" in url.query.lower()
            inside = path.rglob("*") if is_deep else path.glob("*")
            self.send_json(200, [list_entry(root, entry) for entry in sorted(inside)])
        else:
            self.send_json(200, {"id": asked["name"], "sha": COMMIT})

    do_HEAD = do_GET

    def refuse(self, status: int, code: str, message: str) -> None:
        """Sends an error as the Hub does: the client knows it by its code."""
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send_json(status, {"error": message}, **headers)

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), **headers)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Prints nothing: what was asked stands in `requests`."""


def list_entry(root: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """Describes a file or folder as the Hub lists it."""
    entry: dict[str, Any] = {"path": path.relative_to(root).as_posix(), "oid": COMMIT}
    if path.is_dir():
        return entry | {"type": "directory", "size": 0}
    return entry | {"type": "file", "size": path.stat().st_size}
