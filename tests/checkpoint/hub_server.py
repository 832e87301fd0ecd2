"""A Hub on 127.0.0.1, as much of it as huggingface_hub asks for when it downloads models and reads headers.

`hub_uploads.py` adds what it asks for when it uploads.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of every model's main branch."""


@dataclass
class Hub:
    """Models by id, what was asked for, and how many bytes of each file were sent."""

    models: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        repo, revision = match[1], (match[3] if api else match[2]) or "main"
        if repo not in self.models:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}, b"{}"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        folder = self.models[repo]
        if api:
            return 200, {"Content-Type": "application/json"}, json.dumps(self._api(repo, folder, api[2] == "tree")).encode()
        target = folder / unquote(match[3])
        if not target.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"
        content = target.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return 200, headers, content

    def accept(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The same for what changes something; `token` is the caller's."""
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def _api(self, repo: str, folder: Path, tree: bool) -> Any:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if tree:
            return [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                for name, path in zip(names, files, strict=True)
            ]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in names]}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._respond(body_wanted=True)

    def do_HEAD(self) -> None:
        self._respond(body_wanted=False)

    def do_POST(self) -> None:
        self._accept()

    def do_PUT(self) -> None:
        self._accept()

    def _accept(self) -> None:
        path = urlsplit(self.path).path
        sent = self._body()
        self.hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self._send(*self.hub.accept(self.command, path, token, sent), body_wanted=True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _respond(self, *, body_wanted: bool) -> None:
        path = urlsplit(self.path).path
        status, headers, body = self.hub.answer(path)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and wanted and "ETag" in headers:
            first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self.hub.requests.append((self.command, path))
        if body_wanted:
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(body)
        self._send(status, headers, body, body_wanted=body_wanted)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, *, body_wanted: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body_wanted:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, listening at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
