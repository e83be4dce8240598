"""The Hub's API on the loopback, as far as huggingface_hub and diffusers use it here: models in regular files."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER = {"name": "ada", "orgs": [{"name": "tsam"}], "auth": {}}  # whose token is "secret"


class Repository(dict):
    """{path: bytes} of the last of so many `commits`, the only one that is kept."""

    commits = 0


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def refusal(status, message, code=""):
    return status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code}


def answer(hub, method, path, token, data):
    """(status, body, headers)"""
    if token != "secret" and (method == "POST" or path == "/api/whoami-v2"):
        return refusal(401, "Invalid username or password.")
    if path == "/api/whoami-v2":
        return 200, USER, {}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}, {}
    if path == "/api/repos/create":
        name = f"{json.loads(data)['organization'] or USER['name']}/{json.loads(data)['name']}"
        hub.repositories.setdefault(name, Repository())
        return 200, {"url": f"{hub.url}/{name}", "name": name}, {}

    # /api/models/NAME[/WHAT/REVISION] and /NAME/resolve/REVISION/FILE, REVISION being the last one
    found = re.fullmatch(r"(?:/api/models|/api/spaces)?/([^/]+/[^/]+)(?:/(\w+)/[^/]+(?:/(.+))?)?", path)
    files = hub.repositories.get(found[1]) if found else None
    if files is None:
        return refusal(404, f"Repository not found: {path}", "RepoNotFound")
    what, file, sha = found[2], found[3], oid(f"{found[1]} {files.commits}".encode())
    if what == "resolve" and file not in files:
        return refusal(404, f"Entry not found: {file}", "EntryNotFound")
    if what == "resolve":
        return 200, files[file], {"X-Repo-Commit": sha, "ETag": f'"{oid(files[file])}"'}
    if what == "tree":
        return 200, [{"type": "file", "path": p, "size": len(files[p]), "oid": oid(files[p])} for p in files], {}
    if what == "preupload":
        asked = [file["path"] for file in json.loads(data)["files"]]
        oids = {name: oid(files[name]) if name in files else None for name in asked}
        answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": oids[p]} for p in asked]
        return 200, {"files": answers}, {}
    if what == "commit":
        changes = [line["value"] for line in map(json.loads, data.splitlines()) if line["key"] == "file"]
        files |= {change["path"]: base64.b64decode(change["content"]) for change in changes}
        files.commits += 1
        return 200, {"commitOid": sha, "commitUrl": f"{hub.url}/{found[1]}/commit/{sha}"}, {}
    siblings = [{"rfilename": name} for name in files]
    return 200, {"id": found[1], "sha": sha, "siblings": siblings, "tags": []}, {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body, headers = answer(self.server, self.command, path, token, data)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = handle_request

    def log_message(self, *args):
        pass


@contextmanager
def hub_server():
    """A server with a `url`, and `repositories` by name."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url, server.repositories = f"http://127.0.0.1:{server.server_port}", {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
