r"""A stand-in for the Hugging Face Hub: the part of its protocol that reads and writes the files of
a repository, on this machine alone."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, content=b"", code=200, **headers):
        content = json.dumps(content).encode() if isinstance(content, dict | list) else content
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what):
        self.answer({"error": "not found"}, 404, X_Error_Code=what)

    @property
    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.missing("RepoNotFound")
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        if revision not in ("main", self.server.commit):
            return self.missing("RevisionNotFound")
        if api and parts[4:5] == ["tree"]:
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
                for path, content in files.items()
            ]
            return self.answer(listed)
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "sha": self.server.commit, "siblings": siblings})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.missing("EntryNotFound")
        self.answer(content, ETag=f'"{sha1(content)}"', X_Repo_Commit=self.server.commit)

    do_HEAD = do_GET

    def do_POST(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.body
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.url}/{name}", "id": name})
        if parts == ["api", "validate-yaml"]:  # the head of the card
            return self.answer({"errors": [], "warnings": []})
        files = self.server.repositories["/".join(parts[2:4])]
        if parts[4] == "preupload":
            asked = json.loads(body)["files"]
            chosen = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return self.answer({"files": chosen})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{self.server.commit}"
        self.answer({"commitUrl": url, "commitOid": self.server.commit, "success": True})


def sha1(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub():
    r"""A server with :obj:`repositories`, files by path of each by name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.commit = {}, "0123456789abcdef0123456789abcdef01234567"
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
