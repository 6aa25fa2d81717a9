"""A double of the Hugging Face Hub on 127.0.0.1: as much of its API as huggingface_hub, timm and datasets call here.

Users, repositories with commits and tags, LFS, private and gated repositories, ETags and ranges, and faults on demand.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER, STRANGER = "hf_loopbackwriter", "hf_loopbackreader", "hf_loopbackstranger"
USERS = {
    WRITER: dict(name="alice", role="write", orgs=["org", "ride-timm"]),
    READER: dict(name="alice", role="read", orgs=["org"]),
    STRANGER: dict(name="bob", role="write", orgs=[]),
}
LARGE = ("*.safetensors", "*.bin", "*.pth", "*.parquet", "*.png")
DATE = "2026-01-01T00:00:00.000Z"


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass
class Repo:
    """Files by commit; main and the tags point at commits. A file: {"oid", "size", "lfs": sha256 or None, "data"}."""

    type: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    main: str = ""

    def commit(self, files: dict[str, Any], title: str) -> str:
        text = json.dumps([self.main, self.id, title, sorted((p, f["oid"]) for p, f in files.items())])
        self.main = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.main] = dict(files=files, title=title)
        return self.main

    def resolve(self, revision: str) -> str:
        found = {"main": self.main, "HEAD": self.main, **self.tags, **{sha: sha for sha in self.commits}}
        if revision not in found:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[revision]

    def files(self, revision: str = "main") -> dict[str, Any]:
        return self.commits[self.resolve(revision)]["files"]


class Hub:
    """The state, and the server on a free port.

    faults: dicts with `match` (a pattern of paths), `method`, `times` and what is to happen: `status`, or `do`, one of
    "corrupt" (a wrong byte), "cut" (the connection ends early), "short" (a complete response that lacks its end).
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """URL of large files: another host, as on the Hub; clients treat redirects to the same host otherwise."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        handler = type("HandlerOfThisHub", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], type_: str = "model", **kwargs: Any) -> Repo:
        """A repository with these files, made without any client."""
        repo = self.repos.setdefault((type_, repo_id), Repo(type_, repo_id, **kwargs))
        repo.commit(repo.commits[repo.main]["files"] | {p: self.stored(p, d) for p, d in files.items()} if repo.main
                    else {p: self.stored(p, d) for p, d in files.items()}, "put")  # fmt: skip
        return repo

    def stored(self, path: str, data: bytes) -> dict[str, Any]:
        if not any(fnmatch.fnmatch(path, pattern) for pattern in LARGE):
            return dict(oid=git_sha(data), size=len(data), lfs=None, data=data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects[sha256] = data
        return dict(oid=git_sha(sha256.encode()), size=len(data), lfs=sha256)

    def content(self, file: dict[str, Any]) -> bytes:
        return self.objects[file["lfs"]] if file["lfs"] else file["data"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.route_path = parse_qs(url.query), url.path
        self.body = self._read_body()
        self.hub.requests.append(f"{self.command} {self.path}")
        self.fault = next((fault for fault in self.hub.faults if self._hits(fault)), {})
        if self.fault:
            self.fault["times"] = self.fault.get("times", 1) - 1
        try:
            if "status" in self.fault:
                raise HubError(self.fault["status"], "injected")
            self.user = self._authenticate()
            with self.hub.lock:
                self.route(self.route_path)
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self.send_json(
                error.status, {"error": error.message}, error.headers | code | {"X-Error-Message": error.message}
            )
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _hits(self, fault: dict[str, Any]) -> bool:
        wanted = fault.get("method", self.command) == self.command
        return wanted and fault.get("times", 1) > 0 and re.search(fault["match"], self.path) is not None

    def _read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _authenticate(self) -> dict[str, Any] | None:
        given = self.headers.get("Authorization")
        if not given or self.route_path.startswith(("/_lfs", "/_cdn")):
            return None
        if (user := USERS.get(given.removeprefix("Bearer "))) is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.get("do")
        whole = len(data)
        if kind == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 0xFF])
        elif kind in ("short", "cut"):
            data = data[: whole // 2]
        self.send_response(status)
        self.send_header("Connection", "close")  # so that a server that was stopped is really gone
        for name, value in ({"Content-Length": str(whole if kind != "short" else len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if kind == "cut":
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    # who may what

    def _is_member(self, owner: str) -> bool:
        return self.user is not None and owner in [self.user["name"], *self.user["orgs"]]

    def repo(self, type_: str, id_: str, write: bool = False, content: bool = False) -> Repo:
        owner = id_.partition("/")[0]
        repo = self.hub.repos.get((type_, id_))
        if repo is None or (repo.private and not self._is_member(owner)):  # the Hub does not tell missing from private
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not self._is_member(owner):
            raise HubError(403 if self.user else 401, f"Access to {type_} {id_} is restricted.", "GatedRepo")
        if write:
            self.check_write(owner)
        return repo

    def check_write(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user["role"] != "write" or not self._is_member(owner):
            raise HubError(403, f"Forbidden: you don't have the rights to write to {owner}")

    # routes

    def route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/agent-harnesses":
            return self.send_json(200, {"standardEnvVars": [], "harnesses": {}})
        if path == "/api/validate-yaml":
            return self.send_json(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create()
        if match := re.fullmatch(r"/_lfs/(?:verify/)?(\w+)", path):
            return self.put_object(match[1])
        if match := re.fullmatch(r"/_cdn/(\w+)", path):
            return self.send_part(self.hub.objects[match[1]], {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(match[1] or "model", match[2])
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(match[1] or "model", *map(unquote, match.groups()[1:]))
        if match := re.fullmatch(
            r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.*))?)?", path
        ):
            type_, id_, action, argument, _ = match.groups()
            name = f"{self.command.lower()}_{(action or 'revision').replace('-', '_')}"
            if hasattr(self, name):
                writes = self.command == "POST" and action != "paths-info"
                return getattr(self, name)(self.repo(type_, id_, write=writes), unquote(argument or "main"))
        raise HubError(404, f"no route {self.command} {path}")

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [dict(type="org", name=name) for name in self.user["orgs"]]
        auth = dict(type="access_token", accessToken=dict(displayName="test", role=self.user["role"]))
        self.send_json(200, dict(type="user", name=self.user["name"], orgs=orgs, auth=auth))

    def create(self) -> None:
        given = json.loads(self.body)
        owner = given.get("organization") or (self.user or {}).get("name", "")
        self.check_write(owner)
        type_, id_ = given.get("type", "model"), f"{owner}/{given['name']}"
        url = f"{self.hub.endpoint}/{'' if type_ == 'model' else f'{type_}s/'}{id_}"
        if type_ == "space" and "sdk" not in given:
            raise HubError(400, "sdk is required")
        if (type_, id_) in self.hub.repos:
            return self.send_json(409, {"error": "You already created this repo", "url": url})
        repo = self.hub.repos[type_, id_] = Repo(type_, id_, bool(given.get("private")))
        repo.commit({}, "initial commit")
        self.send_json(200, {"url": url, "name": id_})

    def get_revision(self, repo: Repo, revision: str) -> None:
        sha = repo.resolve(revision)
        siblings = [dict(rfilename=path) for path in sorted(repo.files(revision))]
        card = repo.files(revision).get("README.md")
        match = re.match(r"---\n(.*?)\n---", self.hub.content(card).decode(), re.S) if card else None
        facts = dict(id=repo.id, modelId=repo.id, author=repo.id.partition("/")[0], sha=sha, private=repo.private)
        facts |= dict(
            gated=repo.gated, disabled=False, lastModified=DATE, createdAt=DATE, downloads=0, likes=0, tags=[]
        )
        self.send_json(200, facts | dict(cardData=yaml.safe_load(match[1]) if match else None, siblings=siblings))

    def get_refs(self, repo: Repo, _: str) -> None:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [dict(name=n, ref=f"refs/{kind}/{n}", targetCommit=sha) for n, sha in refs.items()]

        self.send_json(
            200, dict(branches=listed("heads", {"main": repo.main}), tags=listed("tags", repo.tags), converts=[])
        )

    def node(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        lfs = dict(lfs=dict(oid=file["lfs"], size=file["size"], pointerSize=130)) if file["lfs"] else {}
        return dict(type="file", oid=file["oid"], size=file["size"], path=path) | lfs

    def get_tree(self, repo: Repo, revision: str) -> None:
        under = unquote(self.route_path.partition("/tree/")[2].partition("/")[2]).strip("/")
        prefix = f"{under}/" if under else ""
        inside = {path: file for path, file in repo.files(revision).items() if path.startswith(prefix)}
        if under and not inside:
            raise HubError(404, f"{under} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {prefix + path[len(prefix) :].rpartition("/")[0] for path in inside if "/" in path[len(prefix) :]}
        nodes = [dict(type="directory", oid=git_sha(path.encode()), size=0, path=path) for path in sorted(folders)]
        nodes += [self.node(p, f) for p, f in sorted(inside.items()) if recursive or "/" not in p[len(prefix) :]]
        self.send_json(200, nodes)

    def post_paths_info(self, repo: Repo, revision: str) -> None:
        files = repo.files(revision)
        given = json.loads(self.body) if self.body[:1] == b"{" else parse_qs(self.body.decode())
        self.send_json(200, [self.node(path, files[path]) for path in given.get("paths", []) if path in files])

    def post_tag(self, repo: Repo, revision: str) -> None:
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubError(409, f"Tag {name} already exists")
        repo.tags[name] = repo.resolve(revision)
        self.send_json(200, {})

    # uploads

    def post_preupload(self, repo: Repo, revision: str) -> None:
        files, answers = repo.files(revision), []
        for given in json.loads(self.body)["files"]:
            large = any(fnmatch.fnmatch(given["path"], pattern) for pattern in LARGE)
            old = files.get(given["path"])
            oid = (old["lfs"] or old["oid"]) if old else None
            mode = "lfs" if large else "regular"
            answers.append(dict(path=given["path"], uploadMode=mode, shouldIgnore=False, oid=oid))
        self.send_json(200, {"files": answers, "commitOid": repo.main})

    def lfs_batch(self, type_: str, id_: str) -> None:
        self.repo(type_, id_, write=True)
        objects = []
        for given in json.loads(self.body)["objects"]:
            actions = {}
            if given["oid"] not in self.hub.objects:
                actions = dict(actions=dict(upload=dict(href=f"{self.hub.storage}/_lfs/{given['oid']}", header={})))
            objects.append(dict(oid=given["oid"], size=given["size"]) | actions)
        self.send_json(200, dict(transfer="basic", objects=objects), {"Content-Type": "application/vnd.git-lfs+json"})

    def put_object(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "sha256 mismatch")
        self.hub.objects[sha256] = self.body
        self.send_json(200, {})

    def post_commit(self, repo: Repo, revision: str) -> None:
        head, *operations = (json.loads(line) for line in self.body.splitlines() if line.strip())
        parent = head["value"].get("parentCommit")
        if parent and parent != repo.main:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = dict(oid=git_sha(data), size=len(data), lfs=None, data=data)
            elif kind == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.stored(value["path"], self.hub.objects[value["oid"]])
            else:
                raise HubError(400, f"rejected: {kind} {value['path']}")
        sha = repo.commit(files, head["value"]["summary"])
        self.send_json(200, dict(commitOid=sha, commitUrl=f"{self.hub.endpoint}/{repo.id}/commit/{sha}", hookOutput=""))

    # downloads

    def download(self, type_: str, id_: str, revision: str, path: str) -> None:
        repo = self.repo(type_, id_, content=True)
        headers = {"X-Repo-Commit": repo.resolve(revision), "Accept-Ranges": "bytes"}
        file = repo.files(revision).get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if file["lfs"]:
            headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-ETag": f'"{file["lfs"]}"'}
            return self.send(302, b"", headers | {"Location": f"{self.hub.storage}/_cdn/{file['lfs']}"})
        self.send_part(self.hub.content(file), headers | {"ETag": f'"{file["oid"]}"'})

    def send_part(self, data: bytes, headers: dict[str, str]) -> None:
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            if first >= len(data):
                raise HubError(416, "bad range", headers={"Content-Range": f"bytes */{len(data)}"})
            part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self.send(206, data[first : last + 1], headers | part)
        self.send(200, data, headers)
