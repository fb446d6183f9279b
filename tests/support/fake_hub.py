"""A stand-in of the Hugging Face Hub: the few requests that push, pull and clone make, over repositories in memory.

Repositories have commits in one line, tags, files that are part of a commit, and large files by sha256.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit


@dataclass
class Repository:
    """Commits by their number, the tags, whether it is private, and by what it is found in lists."""

    is_private: bool = False
    filters: list[str] = field(default_factory=list)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    main: str = ""
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        number = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[number] = files
        self.main = number
        self.messages.append(message)
        return number

    def resolve(self, revision: str) -> str | None:
        number = self.main if revision == "main" else self.tags.get(revision, revision)
        return number if number in self.commits else None


class FakeHub:
    """What the stand-in holds, and what was asked of it.

    Args:
        token: who has none gets no repository.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, list[tuple[str, str]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.failures: list[int] = []
        self.commit_failures: list[int] = []
        self.before_commit: list[Any] = []
        self.lock = threading.Lock()
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            failure = self.hub.failures.pop() if self.hub.failures else None
        if failure is not None:
            return self._send(failure, {"error": "a failure that was asked for"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "Invalid credentials"})
        for pattern, action in ROUTES:
            if (match := re.fullmatch(pattern, path)) and action[0] in (self.command, "ANY"):
                return action[1](self, body, *match.groups())
        return self._send(404, {"error": f"no route {self.command} {path}"})

    def _send(self, status: int, document: Any = None, *, data: bytes | None = None, **headers: str) -> None:
        data = json.dumps(document).encode() if data is None else data
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo"})
        repository = self.hub.repositories[name] = Repository(
            is_private="private" in (asked.get("visibility"), asked.get("private") and "private")
        )
        repository.commit({".gitattributes": b""}, "initial commit")
        return self._send(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def _found(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif (number := repository.resolve(revision)) is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return repository, number
        return None

    def _info(self, _body: bytes, name: str, revision: str = "main") -> None:
        if found := self._found(name, revision):
            siblings = [{"rfilename": path} for path in sorted(found[0].commits[found[1]])]
            about = {"private": found[0].is_private, "tags": [], "siblings": siblings}
            self._send(200, {"id": name, "sha": found[1], **about})

    def _list(self, _body: bytes) -> None:
        """Two of a page: the address of the next one is in a header."""
        asked = parse_qs(urlsplit(self.path).query)
        author, filters = asked.get("author", [""])[0], asked.get("filter", [])
        names = [
            name
            for name, repository in sorted(self.hub.repositories.items())
            if name.startswith(f"{author}/") and set(filters) <= set(repository.filters)
        ]
        start = int(asked.get("start", ["0"])[0])
        query = urlencode([("author", author), *(("filter", each) for each in filters), ("start", start + 2)])
        link = {"Link": f'<{self.hub.url}/api/models?{query}>; rel="next"'} if len(names) > start + 2 else {}
        self._send(200, [{"id": name, "modelId": name} for name in names[start : start + 2]], **link)

    def _collection(self, _body: bytes, slug: str) -> None:
        if slug not in self.hub.collections:
            return self._send(404, {"error": "Collection not found"})
        items = [
            {"_id": str(position), "id": name, "type": kind, "position": position}
            for position, (kind, name) in enumerate(self.hub.collections[slug])
        ]
        about = {"title": slug, "owner": {"name": "user"}, "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0}
        return self._send(200, {"slug": slug, **about, "private": False, "theme": "blue", "upvotes": 0, "items": items})

    def _preupload(self, body: bytes, name: str, _revision: str) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [
            {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular"}
            for path in files
        ]
        self._send(200, {"files": modes})

    def _batch(self, body: bytes, _name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}
            objects.append({**each, **({} if each["oid"] in self.hub.large else {"actions": action})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, sha256: str) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            return self._send(400, {"error": "other content"})
        self.hub.large[sha256] = body
        self.hub.uploads.append(sha256)
        return self._send(200, {})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if self.hub.before_commit:
            self.hub.before_commit.pop()()
        if self.hub.commit_failures:
            return self._send(self.hub.commit_failures.pop(), {"error": "a failure that was asked for"})
        if not (found := self._found(name, revision)):
            return None
        repository, number = found
        lines = [json.loads(line) for line in body.splitlines()]
        values = [(line["key"], line["value"]) for line in lines]
        with self.hub.lock:
            if values[0][1].get("parentCommit") not in (None, repository.main):
                return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(repository.commits[number])
            for kind, value in values[1:]:
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                else:
                    assert kind == "deletedFile"
                    del files[value["path"]]
            made = repository.commit(files, values[0][1]["summary"])
        return self._send(
            200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made, "hookOutput": ""}
        )

    def _tag(self, body: bytes, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            tag = json.loads(body)["tag"]
            if tag in found[0].tags:
                return self._send(409, {"error": "Tag exists"})
            found[0].tags[tag] = found[1]
            return self._send(200, {})
        return None

    def _resolve(self, _body: bytes, name: str, revision: str, path: str) -> None:
        if not (found := self._found(name, revision)):
            return None
        data = found[0].commits[found[1]].get(path)
        if data is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            return self._send(206, data=data[int(span[1]) : int(span[2]) + 1])
        return self._send(200, data=data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=found[1])

    def _validate(self, _body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, tuple[str, Any]]] = [
    ("/api/repos/create", ("POST", _Handler._create)),
    ("/api/validate-yaml", ("POST", _Handler._validate)),
    ("/api/models", ("GET", _Handler._list)),
    (r"/api/collections/([^/]+/[^/]+)", ("GET", _Handler._collection)),
    (rf"/api/models/{NAME}/revision/(.+)", ("GET", _Handler._info)),
    (rf"/api/models/{NAME}", ("GET", _Handler._info)),
    (rf"/api/models/{NAME}/preupload/(.+)", ("POST", _Handler._preupload)),
    (rf"/api/models/{NAME}/commit/(.+)", ("POST", _Handler._commit)),
    (rf"/api/models/{NAME}/tag/(.+)", ("POST", _Handler._tag)),
    (rf"/{NAME}\.git/info/lfs/objects/batch", ("POST", _Handler._batch)),
    (r"/lfs/([0-9a-f]{64})", ("PUT", _Handler._upload)),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", ("ANY", _Handler._resolve)),
]


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A stand-in on this machine, for as long as the block."""
    hub = FakeHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
