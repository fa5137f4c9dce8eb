"""A local Hub server for tests: huggingface_hub can create, fill, tag and read repositories, and tests can inject faults.

It implements the part of the Hub's HTTP API that huggingface_hub uses, keeps everything in memory and binds to 127.0.0.1
only. `python tests/hub_server.py` runs one to try by hand (`HF_ENDPOINT=http://127.0.0.1:PORT HF_TOKEN=writer`).
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".parquet")


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The Hub's id of this content: sha256 for LFS, else git's blob hash."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    title: str


@dataclass
class Repository:
    private: bool = False
    sdk: str | None = None  # of a Space
    commits: dict[str, Commit] = field(default_factory=dict)  # in the order in which they were made
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = Commit(files, title)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: f.content for path, f in self.commits[self.resolve(revision) or ""].files.items()}


@dataclass
class Fault:
    """A fault: what the server does instead of answering."""

    method: str
    path: str  # regular expression
    status: int | None = None
    message: str = "as the test asked"
    reply: dict = field(default_factory=dict)  # more of the answer to a status
    drop: bool = False  # read half of the body, then cut the connection
    drop_after: bool = False  # do the work, then cut the connection instead of answering
    corrupt: bool = False  # change a byte of the body on its way
    delay: float = 0.0  # seconds
    skip: int = 0  # requests to let pass first
    times: int = 10**9

    def __call__(self, method: str, path: str) -> bool:
        if self.times > 0 and method == self.method and re.search(self.path, path):
            if self.skip > 0:
                self.skip -= 1
                return False
            self.times -= 1
            return True
        return False


class Hub:
    """The server. `with Hub() as hub: HfApi(endpoint=hub.url, token="writer")`.

    Tokens: `writer` is the user somebody, who may only write in somebody/; `reader` is the user reader, who may not write.
    """

    users = {"writer": "somebody", "reader": "reader"}

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # by id; a Space's begins with spaces/
        self.blobs: dict[str, bytes] = {}  # LFS contents by sha256
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD /path"
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, **what: object) -> None:
        """Answer matching requests with a `Fault`."""
        self.faults.append(Fault(method, path, **what))  # type: ignore[arg-type]

    def reset(self) -> None:
        """Remove all repositories and faults."""
        self.repositories.clear()
        self.blobs.clear()
        self.faults.clear()
        self.requests.clear()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **reply: object):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.reply = {"error": message, **reply}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart; without this the second waits for the acknowledgement of the first.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            fault = next((f for f in self.hub.faults if f(self.command, path)), None)
        if fault is not None:
            time.sleep(fault.delay)
            if fault.drop:
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                return self._cut()
        body = self._body()
        if fault is not None and fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        try:
            if fault is not None and fault.status is not None:
                raise RefusedError(fault.status, fault.message, **fault.reply)
            for method, pattern, action in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    groups = match.groupdict()
                    if (groups.pop("kind", None) or "").startswith("spaces"):
                        groups["repo"] = f"spaces/{groups['repo']}"
                    with self.hub.lock:
                        reply = action(self, body, **groups)
                    break
            else:
                raise RefusedError(404, f"no route for {self.command} {path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            return self._send(refused.status, json.dumps(refused.reply).encode(), headers)
        if fault is not None and fault.drop_after:
            return self._cut()
        if isinstance(reply, File):
            return None  # sent already
        return self._send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and for what.

    def _user(self) -> str:
        """The user of the token; 401 if it is missing or unknown."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo)
        if write and namespace(repo) != self._user():
            raise RefusedError(403, f"You don't have the rights to write to {repo}")
        if repository is None or (repository.private and not self._owns(repo)):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return repository

    def _owns(self, repo: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.users.get(token) == namespace(repo)

    def _commit_at(self, repository: Repository, revision: str) -> tuple[str, Commit]:
        sha = repository.resolve(revision)
        if sha is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # Repositories.

    def whoami(self, body: bytes) -> object:
        return {"type": "user", "name": self._user(), "auth": {"accessToken": {"role": "write"}}, "orgs": []}

    def create(self, body: bytes) -> object:
        wanted, user = json.loads(body), self._user()
        kind = wanted.get("type") or "model"
        if kind == "space" and not wanted.get("sdk"):
            raise RefusedError(400, "a Space needs an sdk")
        place = f"{wanted.get('organization') or user}/{wanted['name']}"
        if namespace(place) != user:
            raise RefusedError(
                403, f"You don't have the rights to create a {kind} under the namespace {namespace(place)}"
            )
        repo = f"spaces/{place}" if kind == "space" else place
        if repo in self.hub.repositories:
            raise RefusedError(409, f"You already created this {kind} repo", url=f"{self.hub.url}/{repo}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[repo] = Repository(private, wanted.get("sdk"))
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return {"url": f"{self.hub.url}/{repo}", "name": place, "id": place}

    def info(self, body: bytes, repo: str, revision: str = "main") -> object:
        repository = self._repository(repo)
        sha, commit = self._commit_at(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {
            "id": repo.removeprefix("spaces/"),
            "modelId": repo.removeprefix("spaces/"),
            "sha": sha,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
        }

    def refs(self, body: bytes, repo: str) -> object:
        repository = self._repository(repo)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        refs = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": sha} for n, sha in names.items()]
            for kind, (place, names) in kinds.items()
        }
        return {**refs, "converts": []}

    def commits(self, body: bytes, repo: str, revision: str) -> object:
        repository = self._repository(repo)
        self._commit_at(repository, revision)
        return [
            {"id": sha, "title": commit.title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for sha, commit in reversed(repository.commits.items())
        ]

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> object:
        _, commit = self._commit_at(self._repository(repo), revision)
        entries: dict[str, dict] = {}
        for path, file in commit.files.items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            inside = path.removeprefix(f"{folder}/") if folder else path
            if "/" in inside and "recursive" not in self.query:
                name = f"{folder}/{inside.split('/')[0]}".lstrip("/")
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                continue
            lfs = {"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 130}} if file.lfs else {}
            entries[path] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid, **lfs}
        return list(entries.values())

    # Uploads.

    def validate_yaml(self, body: bytes) -> object:
        card = json.loads(body)["content"]
        return {"errors": [], "warnings": [] if card.startswith("---\n") else [{"message": "no metadata"}]}

    def preupload(self, body: bytes, repo: str, revision: str) -> object:
        _, commit = self._commit_at(self._repository(repo, write=True), revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": commit.files[file["path"]].oid if file["path"] in commit.files else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, repo: str) -> object:
        self._repository(repo, write=True)
        return {
            "transfer": "basic",
            "objects": [
                {"oid": o["oid"], "size": o["size"]}
                if o["oid"] in self.hub.blobs
                else {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}?signature=secret"}}}
                for o in json.loads(body)["objects"]
            ],
        }

    def lfs_put(self, body: bytes, oid: str) -> object:
        if "Authorization" in self.headers:
            raise RefusedError(400, "the token belongs to the Hub, not to its storage")
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "BadDigest: the content does not have the announced sha256")
        self.hub.blobs[oid] = body
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> object:
        repository = self._repository(repo, write=True)
        if revision not in repository.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, base = self._commit_at(repository, revision)
        files, title = dict(base.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise RefusedError(400, f"LFS pointer {value['path']} points to a file that does not exist")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise RefusedError(400, f"unknown operation {line['key']}")
        sha = repository.commit(revision, files, title)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "hookOutput": ""}

    def tag(self, body: bytes, repo: str, revision: str) -> object:
        repository, name = self._repository(repo, write=True), json.loads(body)["tag"]
        if name in repository.tags:
            raise RefusedError(409, f"Tag reference exists already: {name}")
        repository.tags[name] = self._commit_at(repository, revision)[0]
        return {}

    def branch(self, body: bytes, repo: str, revision: str) -> object:
        repository = self._repository(repo, write=True)
        if revision in repository.branches:
            raise RefusedError(409, f"Reference already exists: {revision}")
        repository.branches[revision] = self._commit_at(repository, json.loads(body).get("startingPoint", "main"))[0]
        return {}

    # Downloads.

    def download(self, body: bytes, repo: str, revision: str, path: str) -> object:
        sha, commit = self._commit_at(self._repository(repo), revision)
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        content, status = file.content, 200
        if match := re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")):
            first = int(match[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        self._send(status, content, headers)
        return file


def namespace(repo: str) -> str:
    """The owner of the repository."""
    return repo.removeprefix("spaces/").split("/")[0]


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = f"/api/(?P<kind>models|spaces)/{REPO}"
PAGE = f"/(?P<kind>spaces/)?{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"{API}", Handler.info),
    ("GET", f"{API}/revision/{REVISION}", Handler.info),
    ("GET", f"{API}/refs", Handler.refs),
    ("GET", f"{API}/commits/{REVISION}", Handler.commits),
    ("GET", f"{API}/tree/{REVISION}", Handler.tree),
    ("GET", f"{API}/tree/{REVISION}/(?P<folder>.+)", Handler.tree),
    ("POST", f"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", f"{API}/commit/{REVISION}", Handler.commit),
    ("POST", f"{API}/tag/{REVISION}", Handler.tag),
    ("POST", f"{API}/branch/{REVISION}", Handler.branch),
    ("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", Handler.download),
]


if __name__ == "__main__":
    with Hub() as hub:
        print(f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=writer")
        while True:
            time.sleep(1)
