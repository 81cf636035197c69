"""A Hub in memory, on loopback, that fails when it is told to.

    with HubServer() as hub:
        hub.fault = Fault(at=3, kind="middle")

It answers the requests that huggingface_hub and transformers send: repositories are made and deleted, commits are taken
whole or not at all and must follow the head that they name, large files go by LFS, refs are branches, pull requests and
commits. Cards are refused whose metadata the Hub's own rules refuse: of licences, ids, and types of data sets in results.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hub-token"
NAME = r"(?P<name>[^/]+/[^/]+)"
LARGE = (".safetensors",)
LARGE_SIZE = 10_000_000  # bytes, from which a file of any name goes by LFS
REPO_ID = re.compile(r"(?:[A-Za-z0-9_-]+/)?[A-Za-z0-9_.-]+")
# Ids of the Hub's list of licences, https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Args:
        at: index of the request, from 0.
        kind: the connection is cut ``"before"`` the request is read, in the ``"middle"`` of it (of its body or, where it
            has none, of the answer) or ``"after"`` it took effect and before the answer; ``"500"`` is answered in place
            of the effect.
        lasting: all later requests meet it too.
    """

    at: int
    kind: str
    lasting: bool = False


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, message: str, files: dict[str, bytes]) -> Commit:
        parent = self.refs.get(ref)
        content = [parent, message, len(self.commits), sorted((name, git_hash(data)) for name, data in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, ref: str = "main") -> list[Commit]:
        """The commits of a ref, newest first."""
        oid, commits = self.refs[ref], []
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Cut(Exception):
    """The connection ends here."""


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str, size: int) -> bool:
    return name.endswith(LARGE) or size > LARGE_SIZE


def faults_of_card(text: str) -> list[str]:
    """What the Hub refuses in a card's metadata."""
    data = ModelCard(text).data.to_dict()
    base_models = data.get("base_model") or []
    ids = [*([base_models] if isinstance(base_models, str) else base_models), *(data.get("datasets") or [])]
    faults = [f'"{name}" is no id of the Hub' for name in ids if not REPO_ID.fullmatch(name)]
    if data.get("license", "other") not in LICENSES.split():
        faults.append('"license" must be one of [' + ", ".join(LICENSES.split()) + "]")
    for model in data.get("model-index") or []:
        for place, result in enumerate(model["results"]):
            if not REPO_ID.fullmatch(result["dataset"]["type"]):
                faults.append(f'"model-index[0].results[{place}].dataset.type" fails to match the required pattern')
    return faults


class HubServer:
    """The Hub. `repositories` is what it holds, `requests` what was asked, `fault` what goes wrong.

    Attributes:
        token: the one that may write.
        before: called with the method and path of each request, before it is handled; what it raises as `Refused` is
            answered.
    """

    def __init__(self):
        self.token = TOKEN
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault | None = None
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.RLock()
        hub = self

        class Handler(RequestHandler):
            server_hub = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: Any) -> dict[str, str]:
        """Environment variables of a process that uses this Hub, its cache in a fresh folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def attach(self, monkeypatch) -> None:
        """Makes this process use this Hub, without the waits between tries."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http, close_session

        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", self.token)

    def make(self, name: str, private: bool = False) -> Repository:
        """A new repository, with the commit that the Hub begins it with."""
        repository = self.repositories[name] = Repository(private)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def state(self, name: str) -> dict[str, tuple[str, dict[str, bytes]]] | None:
        """Every ref of a repository, with its commit and files; None where there is no repository."""
        if name not in self.repositories:
            return None
        repository = self.repositories[name]
        return {ref: (oid, repository.commits[oid].files) for ref, oid in repository.refs.items()}

    def fault_now(self, index: int) -> str | None:
        """What goes wrong with the request of that index."""
        fault = self.fault
        if fault and (index == fault.at or (fault.lasting and index > fault.at)):
            return fault.kind
        return None


class RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_hub: HubServer

    def log_message(self, *arguments) -> None:
        pass

    def do_any(self) -> None:
        hub = self.server_hub
        with hub.lock:
            index = len(hub.requests)
            hub.requests.append((self.command, self.path))
        kind = hub.fault_now(index)
        try:
            if kind == "before":
                raise Cut
            refusal = self.refusal()
            body = self.read_body(half=kind == "middle")
            with hub.lock:
                answered = self.refused(refusal) if refusal else self.answer(body) if kind != "500" else None
            status, headers, content = answered or (500, {}, b"broken")
            if kind == "after":
                raise Cut
            self.send(status, headers, content, half=kind == "middle")
        except (Cut, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def refusal(self) -> Refused | None:
        try:
            self.server_hub.before(self.command, self.path)
        except Refused as refusal:
            return refusal

    @staticmethod
    def refused(refusal: Refused) -> tuple[int, dict[str, str], bytes]:
        headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
        headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        return refusal.status, headers, json.dumps({"error": refusal.message}).encode()

    def read_body(self, half: bool) -> bytes:
        """The body of the request; of a `half` one, what came before the cut."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    raise Cut
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length", 0))
        if half and length:
            self.rfile.read(length // 2)
            raise Cut
        return self.rfile.read(length)

    def send(self, status: int, headers: dict[str, str], content: bytes, half: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if half:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            raise Cut
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The effect of a request, and its answer."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            for method, pattern, route in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    answered = route(self, body=body, query=query, **parts)
                    if isinstance(answered, tuple):
                        return answered
                    return 200, {"Content-Type": "application/json"}, json.dumps(answered).encode()
            raise Refused(404, f"no such route: {self.command} {url.path}")
        except Refused as refusal:
            return self.refused(refusal)

    def check_token(self) -> None:
        """Refuses whoever may not write."""
        given = self.headers.get("Authorization")
        if given is None:
            raise Refused(401, "Invalid username or password.")
        if given != f"Bearer {self.server_hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def repository(self, name: str) -> Repository:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.server_hub.token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        repository = self.server_hub.repositories.get(name)
        if repository is None or (repository.private and given is None):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def commit_at(self, name: str, revision: str) -> Commit:
        repository = self.repository(name)
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    def create_repo(self, body: bytes, query: dict) -> dict:
        self.check_token()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server_hub.repositories:
            raise Refused(409, "You already created this model repo")
        self.server_hub.make(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.server_hub.url}/{name}"}

    def delete_repo(self, body: bytes, query: dict) -> dict:
        self.check_token()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.repository(name)
        del self.server_hub.repositories[name]
        return {}

    def model_info(self, body: bytes, query: dict, name: str, revision: str = "main") -> dict:
        commit = self.commit_at(name, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.repository(name).private
        return {"id": name, "modelId": name, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings}

    def tree(self, body: bytes, query: dict, name: str, revision: str, path: str = "") -> list:
        files = self.commit_at(name, revision).files
        inside = {file: data for file, data in files.items() if not path or file.startswith(f"{path}/")}
        if path and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        return [self.entry(file, data) for file, data in sorted(inside.items())]

    @staticmethod
    def entry(path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if is_large(path, len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def preupload(self, body: bytes, query: dict, name: str, revision: str) -> dict:
        self.check_token()
        files = self.commit_at(name, revision).files
        patterns = files.get(".gitignore", b"").decode().split()

        def plan(path: str, size: int) -> dict:
            mode = "lfs" if is_large(path, size) else "regular"
            is_ignored = any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
            oid = None
            if path in files:
                oid = hashlib.sha256(files[path]).hexdigest() if mode == "lfs" else git_hash(files[path])
            return {"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid}

        return {"files": [plan(file["path"], file["size"]) for file in json.loads(body)["files"]]}

    def lfs_batch(self, body: bytes, query: dict, name: str) -> dict:
        self.check_token()
        self.repository(name)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, place = wanted["oid"], f"{self.server_hub.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append({"oid": oid, "size": wanted["size"]})
            if oid not in self.server_hub.objects:
                objects[-1]["actions"] = actions
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, query: dict, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the object is not what its id says")
        self.server_hub.objects[oid] = body
        return {}

    def lfs_verify(self, body: bytes, query: dict, oid: str) -> dict:
        if len(self.server_hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "the object is not there")
        return {}

    def commit(self, body: bytes, query: dict, name: str, revision: str) -> dict:
        self.check_token()
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = self.commit_at(name, revision)
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.objects:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server_hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository, url = self.repository(name), f"{self.server_hub.url}/{name}"
        if query.get("create_pr") != "1":
            made = repository.commit(revision, header["summary"], files)
            return {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        repository.refs[f"refs/pr/{number}"] = parent.oid
        made = repository.commit(f"refs/pr/{number}", header["summary"], files)
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{url}/commit/{made.oid}",
            "pullRequestUrl": f"{url}/discussions/{number}",
        }

    def validate_yaml(self, body: bytes, query: dict) -> tuple:
        errors = [{"message": fault} for fault in faults_of_card(json.loads(body)["content"])]
        answer = {"warnings": [], "errors": errors}
        return 400 if errors else 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def resolve(self, body: bytes, query: dict, name: str, revision: str, path: str) -> tuple:
        commit = self.commit_at(name, revision)
        if path not in commit.files:
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": commit.oid,
            }
            return 404, headers, b""
        data = commit.files[path]
        large = is_large(path, len(data))
        tag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))} if large else {}
        return 200, headers, data


ROUTES = [
    ("POST", "/api/repos/create", RequestHandler.create_repo),
    ("DELETE", "/api/repos/delete", RequestHandler.delete_repo),
    ("POST", "/api/validate-yaml", RequestHandler.validate_yaml),
    ("GET", rf"/api/models/{NAME}", RequestHandler.model_info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", RequestHandler.model_info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", RequestHandler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", RequestHandler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", RequestHandler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", RequestHandler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", RequestHandler.lfs_put),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", RequestHandler.lfs_verify),
    ("HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", RequestHandler.resolve),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", RequestHandler.resolve),
]
