"""Claims about `tune push`, against the server of test_hub.py, which here takes what the real client uploads."""

import base64
import json

import huggingface_hub
import pytest
from test_hub import LFS, Hub, serve, sha256, tune  # noqa: F401  tune is a fixture

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "adapter/adapter_model.safetensors": b"matrices" * 100,
    "adapter/adapter_config.json": b"{}",
}


class WritableHub(Hub):
    """The same with the endpoints of uploads: repositories, branches, LFS's batches and objects, commits."""

    def do_GET(self):
        if "xet-write-token" in self.path:  # it has LFS's store only
            return self.reply(404)
        super().do_GET()

    def do_POST(self):
        path = self.path.partition("?")[0].strip("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.asked.append(path)
        if path == "api/validate-yaml":
            return self.reply_json({"errors": [], "warnings": []})
        if token != "right":
            said = f"Invalid credentials: {token}"
            return self.reply(403 if token == "reader" else 401, message=said)
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply_json({"transfer": "basic", "objects": list(map(self.lfs, json.loads(body)["objects"]))})
        _, _, owner, name, verb, _ = path.split("/")
        if verb == "branch":
            self.server.revisions.add(path.rpartition("/")[2])
            return self.reply_json({})
        if verb == "preupload":
            return self.reply_json({"files": list(map(self.upload_mode, json.loads(body)["files"]))})
        for line in map(json.loads, body.splitlines()):
            if line["key"] != "header":
                self.commit(self.server.repos[f"models/{owner}/{name}"], **line)
        self.reply_json({"commitUrl": f"{self.server.url}/{owner}/{name}/commit/1", "commitOid": "1" * 40})

    def do_PUT(self):
        assert "Authorization" not in self.headers  # the store is somebody else's
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rpartition("/")[2]] = content
        self.reply(200)

    def create(self, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        exists = f"models/{repo}" in self.server.repos
        if not exists:
            self.server.repos[f"models/{repo}"] = {}
            self.server.private |= {repo} if asked.get("visibility") == "private" else set()
        body = json.dumps({"url": f"{self.server.url}/{repo}"}).encode()
        self.reply(409 if exists else 200, body, {"Content-Type": "application/json"})

    def lfs(self, asked):
        href = f"http://localhost:{self.server.server_port}/put/{asked['oid']}"
        return asked | ({} if asked["oid"] in self.server.objects else {"actions": {"upload": {"href": href}}})

    def upload_mode(self, asked):
        mode = "lfs" if asked["path"].endswith(LFS) else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": asked["path"] in self.server.ignored}

    def commit(self, files, key, value):
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            files[value["path"]] = self.server.objects[value["oid"]]


@pytest.fixture
def hub():
    with serve(WritableHub) as httpd:
        httpd.asked, httpd.objects, httpd.ignored = [], {}, set()
        yield httpd


@pytest.fixture
def push(tune, hub, monkeypatch):  # noqa: F811
    """Runs `tune push` with the server as its endpoint."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)  # and put back afterwards
    return lambda *words: tune("push", *words, "--endpoint", hub.url)


@pytest.fixture
def folder(tmp_path):
    """A run's folder with an export, and what stays here."""
    for name, content in {**FILES, ".cache/pairtune/x": b"x", ".DS_Store": b"x"}.items():
        path = tmp_path / "run" / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("")
    return tmp_path / "run"


def test_a_runs_export_is_uploaded_whole_and_told_before(push, hub, folder):
    words = (folder, "me/mine", "--private", "--hf-token", "right")
    status, told, _ = push(*words, "--dry-run")
    assert status == 0 and hub.asked == []
    for name, content in FILES.items():
        assert f"  {name}" in told and f"{len(content):,} bytes" in told
    assert f"{sum(map(len, FILES.values())):,} bytes in 5 files" in told and "private" in told
    status, out, _ = push(*words, "--revision", "v1")
    assert status == 0 and out.startswith(told.partition(" (main)")[0]) and out.endswith("me/mine has all of it\n")
    assert hub.repos["models/me/mine"] == FILES and "me/mine" in hub.private and "v1" in hub.revisions
    assert hub.objects.keys() == {sha256(content) for name, content in FILES.items() if name.endswith(LFS)}
    (folder / "export" / "config.json").write_bytes(b'{"a": 1}')
    assert push(folder / "export", "me/mine", "--hf-token", "right")[0] == 0  # again, and to what is there
    assert hub.repos["models/me/mine"] == FILES | {"config.json": b'{"a": 1}'}


def test_what_the_repository_leaves_out_is_named(push, hub, folder):
    hub.ignored.add("config.json")
    status, _, error = push(folder, "me/mine", "--hf-token", "right")
    assert status == 2 and "me/mine: config.json: not there, or not as long as here" in error


@pytest.mark.parametrize(
    ("token", "said"),
    [("reader", "forbids it to your token (*"), ("mistyped", "does not know your token"), (None, "needs a token")],
)
def test_a_token_that_may_not_write_is_said_and_never_shown(push, hub, folder, token, said):
    status, out, error = push(folder, "me/mine", *(["--hf-token", token] if token else []))
    assert status == 2 and said.removesuffix("*") in error and "models/me/mine" not in hub.repos
    assert not token or f"credentials: {token}" not in out + error


def test_a_public_repository_gets_nothing_that_was_to_be_private(push, hub, folder):
    hub.repos["models/me/mine"] = {}
    status, _, error = push(folder, "me/mine", "--private", "--hf-token", "right")
    assert status == 2 and "exists and is public" in error and hub.repos["models/me/mine"] == {}


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (["export/model.safetensors"], "holds no weights"),
        (["export/config.json"], "config.json"),
        (["export"], "has exported nothing yet"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_asked(push, hub, folder, remove, said):
    for name in remove:
        path = folder / name
        path.rename(folder.parent / "away")
    status, out, error = push(folder, "me/mine", "--hf-token", "right")
    assert status == 2 and said in error and hub.asked == [] and out == ""
