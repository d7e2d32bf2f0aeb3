"""A model hub on this machine: the routes of the real one that its client uses, over real HTTP.

with HubServer() as server:
    server.push("org/name", {"config.json": b"{}"})
    os.environ["HF_ENDPOINT"] = server.url
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import unquote

_RESOLVE = re.compile(r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[^/?]+(/(?!revision/|tree/)[^/?]+)?)"
    r"(/(?P<route>revision|tree)/(?P<revision>[^/?]+))?(\?.*)?"
)


@dataclass
class Repository:
    """Commits of a repository. ``token`` is what a reader must show; ``gated`` says how a refusal is worded."""

    token: str | None = None
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


class HubServer:
    """A hub to push files to, and to read from over HTTP.

    Attributes:
        url: what HF_ENDPOINT is to be set to.
        requests: ``"METHOD path"`` of every request so far.
        failing_status: when set, the answer to every request.
        on_request: when set, called with each ``"METHOD path"`` before it is answered.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failing_status: int | None = None
        self.on_request = lambda request: None
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def push(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        branch: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Make ``files`` (or the files in a folder) the newest commit of a branch, and return its hash."""
        if isinstance(files, Path):
            folder = files
            paths = [path for path in folder.rglob("*") if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault(repo_id, Repository(token, gated))
        commit = hashlib.sha1(f"{repo_id} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def fetched(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for with this method, sorted."""
        matches = [_RESOLVE.fullmatch(r.removeprefix(f"{method} ")) for r in list(self.requests)]
        return sorted(unquote(match["file"]) for match in matches if match)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        self.hub.on_request(request)
        if self.hub.failing_status is not None:
            return self._refuse(self.hub.failing_status, "", "out of order")
        match = _RESOLVE.fullmatch(self.path) or _API.fullmatch(self.path)
        if match is None:
            return self._refuse(404, "", "no such route")
        repository = self.hub.repositories.get(match["repo"])
        if repository is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.token is not None and token != repository.token:
            if repository.gated:
                return self._refuse(403 if token else 401, "GatedRepo", f"Access to {match['repo']} is restricted.")
            return self._refuse(401, "RepoNotFound", "Repository not found")
        commit = repository.commit(unquote(match["revision"] or "main"))
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        files = repository.commits[commit]
        if "file" not in match.groupdict():
            return self._list(match["route"], match["repo"], commit, files)
        content = files.get(unquote(match["file"]))
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        return self._serve(content, commit)

    def _serve(self, content: bytes, commit: str) -> None:
        start, end = 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else end, end)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self._finish(content[start:end], commit)

    def _list(self, route: str | None, repo_id: str, commit: str, files: Mapping[str, bytes]) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(files.items())
        ]
        siblings = [{"rfilename": name} for name in sorted(files)]
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._finish(json.dumps(entries if route == "tree" else info).encode(), commit)

    def _refuse(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self._finish(json.dumps({"error": message}).encode(), commit)

    def _finish(self, body: bytes, commit: str | None) -> None:
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
