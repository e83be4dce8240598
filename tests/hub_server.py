"""The Hub's API on the loopback, as far as huggingface_hub and diffusers use it here: models, regular files and LFS."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png")


class Refused(Exception):
    """A response that is an error."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(path, data):
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(data)


class Repository:
    """Commits, oldest first: a dict of path to bytes, under its id."""

    def __init__(self, name, private=False):
        self.name, self.private, self.commits = name, private, {}
        self.commit({".gitattributes": "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES).encode()})

    def commit(self, files):
        content = json.dumps([self.name, len(self.commits), {path: git_oid(data) for path, data in files.items()}])
        self.commits[hashlib.sha1(content.encode()).hexdigest()] = dict(files)

    @property
    def head(self):
        return list(self.commits)[-1]

    @property
    def files(self):
        return self.commits[self.head]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        self.path = unquote(urlsplit(self.path).path)
        self.data = self.read()
        self.server.log.append((self.command, self.path))
        try:
            for pattern, (status, message) in self.server.failures.items():
                if re.search(pattern, f"{self.command} {self.path}"):
                    raise Refused(status, message)
            for command, pattern, function in ROUTES:
                found = re.fullmatch(pattern, self.path)
                if self.command in command.split() and found:
                    with self.server.lock:
                        return self.send(*function(self, **found.groupdict()))
            raise Refused(404, f"Not found: {self.command} {self.path}")
        except Refused as refused:
            self.send(refused.body, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send(self, body=b"", status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass

    @property
    def user(self):
        """Who asks: None for nobody."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def owns(self, namespace):
        return self.user is not None and namespace in {self.user["name"], *(org["name"] for org in self.user["orgs"])}

    def repository(self, name, revision="main", write=False):
        """A repository and the commit that `revision` is."""
        repository, mine = self.server.repositories.get(name), self.owns(name.split("/")[0])
        if repository is None or (repository.private and not mine):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not (mine and self.user["auth"]["accessToken"]["role"] == "write"):
            raise Refused(403, "You have read access but not the required permissions for this operation")
        revision = repository.head if revision == "main" else revision
        if revision not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, revision

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return (self.user,)

    def create(self):
        wanted = json.loads(self.data)
        namespace = wanted["organization"] or self.whoami()[0]["name"]
        name = f"{namespace}/{wanted['name']}"
        if not self.owns(namespace) or self.user["auth"]["accessToken"]["role"] != "write":
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo", **answer)
        self.server.repositories[name] = Repository(name, wanted.get("visibility") == "private")
        return (answer,)

    def validate_yaml(self):
        if not json.loads(self.data)["content"].startswith("---\n"):
            raise Refused(400, "no metadata", errors=[{"message": "no metadata"}])
        return ({"errors": [], "warnings": []},)

    def info(self, name, revision="main"):
        repository, sha = self.repository(name, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return ({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []},)

    def tree(self, name, revision):
        repository, sha = self.repository(name, revision)
        entries = []
        for path, data in repository.commits[sha].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": oid_of(path, data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return (entries,)

    def preupload(self, name, revision):
        repository, sha = self.repository(name, revision, write=True)
        held, files = repository.commits[sha], []
        for path in (file["path"] for file in json.loads(self.data)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = oid_of(path, held[path]) if path in held else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return ({"files": files},)

    def lfs_batch(self, name):
        self.repository(name, write=True)
        objects = json.loads(self.data)["objects"]
        for item in objects:
            if item["oid"] not in self.server.lfs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        return ({"transfer": "basic", "objects": objects},)

    def lfs_put(self, oid):
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise Refused(400, "This is not the announced file")
        self.server.lfs[oid] = self.data
        return ()

    def commit(self, name, revision):
        repository, sha = self.repository(name, revision, write=True)
        files = dict(repository.commits[sha])
        for line in map(json.loads, self.data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif line["key"] != "header":
                raise Refused(400, f"unknown operation {line['key']}")
        repository.commit(files)
        return ({"commitOid": repository.head, "commitUrl": f"{self.server.url}/{name}/commit/{repository.head}"},)

    def resolve(self, name, revision, path):
        repository, sha = self.repository(name, revision)
        if path not in repository.commits[sha]:
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.headers["X-Repo-Commit"] = sha
            raise refused
        data = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(path, data)}"'}
        if path.endswith(LFS_SUFFIXES):  # the Hub itself would send to its CDN for these
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return data, 200, headers
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        return data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{NAME}(/revision/(?P<revision>.+))?", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)


class HubServer(ThreadingHTTPServer):
    """A Hub of its own.

    users: who a token is, as whoami-v2 has it. repositories: by name. failures: what to answer, (status, message), to a
    request "POST /api/..." that a regular expression is found in. log: every (method, path) asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.users, self.repositories, self.failures, self.lfs, self.log = {}, {}, {}, {}, []

    def add_user(self, token, name, orgs=(), role="write"):
        orgs = [{"name": org} for org in orgs]
        self.users[token] = {"name": name, "orgs": orgs, "auth": {"accessToken": {"role": role}}}


@contextmanager
def hub_server():
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
