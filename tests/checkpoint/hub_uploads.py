"""The Hub of `hub_server.py` with what huggingface_hub asks for when it uploads: repositories, branches, LFS, commits.

Weights come by the LFS protocol: set HF_HUB_DISABLE_XET=1, since Xet's own server is not imitated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.checkpoint.hub_server import Hub

Answer = tuple[int, dict[str, str], bytes]

TOKENS = {"hf_writer": "me", "hf_reader": None}
"""Whose repositories each token may write."""


@dataclass
class Repo:
    """Files by commit, commits by branch, newest last in `log` with the message."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        commit = hashlib.sha1(f"{len(self.log)}{message}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.log.append(message)
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class UploadHub(Hub):
    """A Hub that takes uploads. `ignored` names files that it leaves out of commits, as a .gitignore there would."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    failing: str = ""

    def new_repo(self, name: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[name] = Repo(private)
        self.repos[name].add("main", {".gitattributes": b"", **(files or {})}, "initial commit")
        return self.repos[name]

    def answer(self, path: str) -> Answer:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None or match[1] not in self.repos:
            return super().answer(path)
        repo, revision = self.repos[match[1]], unquote((match[3] if api else match[2]) or "main")
        if revision not in repo.branches and revision not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files, commit = repo.files(revision), repo.branches.get(revision, revision)
        if file:
            content = files.get(unquote(match[3]))
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}"
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            return 200, headers, content
        if match[2] == "tree":
            return _json([{"type": "file", "path": n, "size": len(c), "oid": _git_hash(c)} for n, c in files.items()])
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": match[1], "sha": commit, "private": repo.private, "siblings": siblings})

    def accept(self, method: str, path: str, token: str, body: bytes) -> Answer:
        if self.failing and self.failing in path:
            return 500, {}, b'{"error": "Internal Server Error"}'
        if path == "/api/validate-yaml":
            return _json({"warnings": [], "errors": []})
        if path.startswith("/upload/"):
            return self._store(path.removeprefix("/upload/"), body)
        if token not in TOKENS:
            return _json({"error": "Invalid username or password."}, 401)
        routes: dict[str, Callable[..., Answer]] = {
            r"/api/repos/create": self._create,
            r"/api/models/([^/]+/[^/]+)/branch/(.+)": self._branch,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self._preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self._commit,
        }
        for pattern, route in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                return route(TOKENS[token], body, *map(unquote, match.groups()))
        return super().accept(method, path, token, body)

    def _create(self, user: str | None, body: bytes) -> Answer:
        asked = json.loads(body)
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            return _json({"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'}, 403)
        url = {"url": f"{self.url}/{name}"}
        if name in self.repos:
            return _json({"error": "You already created this model repo", **url}, 409)
        self.new_repo(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return _json(url)

    def _branch(self, user: str | None, body: bytes, name: str, branch: str) -> Answer:
        repo = self.repos[name]
        if branch in repo.branches:
            return _json({"error": "Reference already exists"}, 409)
        repo.branches[branch] = repo.branches["main"]
        return _json({})

    def _preupload(self, user: str | None, body: bytes, name: str, revision: str) -> Answer:
        if name.split("/")[0] != user:
            return _json({"error": "You don't have write access to this repo"}, 403)
        there = self.repos[name].files(revision)
        return _json({"files": [self._mode(file["path"], there) for file in json.loads(body)["files"]]})

    def _mode(self, path: str, there: dict[str, bytes]) -> dict[str, Any]:
        large = path.endswith((".safetensors", "tokenizer.json"))
        content = there.get(path)
        oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_hash(content)
        mode = "lfs" if large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.ignored, "oid": oid}

    def _batch(self, user: str | None, body: bytes, name: str) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/upload/{asked['oid']}"}}}
            objects.append({**asked, **({} if asked["oid"] in self.objects else upload)})
        return _json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return 200, {}, b""

    def _commit(self, user: str | None, body: bytes, name: str, branch: str) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        repo, message = self.repos[name], lines[0]["value"]["summary"]
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        commit = repo.add(branch, files, message)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})


def _json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
