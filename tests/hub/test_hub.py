"""Claims about `tune download`, against a small server that speaks the Hub's protocol to the real client."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from helpers import save_tokenizer
from huggingface_hub.utils import WeakFileLock

from pairtune import config
from pairtune.cli import commands as cli
from pairtune.cli.find import find, own
from pairtune.cli.next_command import next_command
from pairtune.cli.recipe import read_recipe
from pairtune.config.layout import REPO_ID_FILE, find_weights
from pairtune.errors import UserError
from pairtune.hub import http as hub_http
from pairtune.hub.choice import unread
from pairtune.hub.record import BOOKKEEPING, RECORD
from pairtune.pairs.rows import read_rows

ROOT = Path(cli.__file__).parents[2]
TUNE = Path(sys.executable).with_name("tune")
NOBODY = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
MODEL = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": b"one" * 1000,
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "original/consolidated.00.pth": b"once more",
    "original/tokenizer.model": b"words",
    "pytorch_model.bin": b"and again",
}
KEPT = {name for name in MODEL if not name.endswith((".pth", ".bin"))}
PAIRS = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]
ROWS = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
LFS = (".safetensors", ".bin", ".pth", ".model", ".jsonl")
CHUNK = 10 * 2**20  # what the client writes at a time
LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA3_2_1B = "meta-llama/Llama-3.2-1B-Instruct"
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: listings are open to all, a gated model's files need its token.

    Files in LFS come from a store under another name, localhost, to which a redirect leads.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        busy = next((part for part in self.server.busy if part in path), None)
        if busy:
            status, times = self.server.busy[busy]
            if times == 1:
                del self.server.busy[busy]
            else:
                self.server.busy[busy] = status, times - 1
            return self.reply(status, headers={"Retry-After": "0"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("elsewhere/"):
            return self.reply(200, b"<html>not a Hub</html>", {"Content-Type": "text/html"})
        if path.startswith("store/"):
            self.server.tokens_in_store.append(token)
            return self.reply_file(*path.removeprefix("store/").split("@"))
        kind, path = ("datasets", path) if path.removeprefix("api/").startswith("datasets/") else ("models", path)
        path = path.removeprefix("api/").removeprefix(f"{kind}/")
        if path.count("/") == 1:
            path += "/revision/main"
        owner, name, verb, revision, *file = path.split("/", 4)
        files = self.server.repos.get(f"{kind}/{owner}/{name}")
        if token == "unknown":
            return self.reply(401, message="Invalid credentials in Authorization header")
        if token == "echo":
            return self.reply(403, message=f"Refused: Bearer {token}")
        if self.server.leads_to:
            return self.reply(302, b"", {"Location": self.server.leads_to + self.path})
        self.server.tokens_at_hub.append(token)
        if token == "narrow":
            return self.reply(403, message="Please enable access to public gated repositories in your token's settings")
        if files is None:
            return self.reply(404 if token else 401, error="RepoNotFound")
        if revision not in self.server.revisions:
            return self.reply(404, error="RevisionNotFound")
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": f"{owner}/{name}" in self.server.private}
            return self.reply_json(about | {"siblings": siblings})
        if verb == "paths-info":
            named = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            return self.reply_json([row for row in self.rows(files) if row["path"] in named])
        if verb == "tree":
            folder = f"{file[0]}/" if file else ""
            rows = [row for row in self.rows(files) if row["path"].startswith(folder)]
            if "recursive=true" in self.path.lower():
                rows = [row for row in rows if row["type"] == "file"]
            else:
                rows = [row for row in rows if "/" not in row["path"][len(folder) :]]
            if self.server.pages_at:  # two pages: the first here, the second there
                page = 0 if "cursor" not in self.path else 1
                following = {"Link": f'<{self.server.pages_at}{self.path}&cursor=1>; rel="next"'} if page == 0 else {}
                return self.reply_json([rows[:2], rows[2:]][page], following)
            return self.reply_json(rows)
        if file[0] not in files:
            return self.reply(404, error="EntryNotFound")
        if name == "gated" and token != "right":
            return self.reply(403 if token else 401, error="GatedRepo")
        if file[0].endswith(LFS):
            store = f"http://localhost:{self.server.server_port}/store/{kind}/{owner}/{name}@{file[0]}"
            linked = {"X-Linked-Size": str(len(files[file[0]])), "X-Linked-ETag": sha256(files[file[0]])}
            return self.reply(302, b"", {"Location": store, "X-Repo-Commit": COMMIT, **linked})
        self.reply_file(f"{kind}/{owner}/{name}", file[0])

    do_HEAD = do_POST = do_GET

    def rows(self, files):
        """Files, and the folders that they are in."""
        folders = {str(folder) for file in files for folder in Path(file).parents if str(folder) != "."}
        rows = [{"type": "directory", "path": folder, "size": 0, "oid": "2" * 40} for folder in sorted(folders)]
        return rows + [self.row(file, body) for file, body in files.items()]

    def row(self, file, body):
        size = self.server.pretended_sizes.get(file, len(body))
        row = {"type": "file", "path": file, "size": size, "oid": hashlib.sha1(b"blob %d\0" % size + body).hexdigest()}
        if file.endswith(LFS):
            row |= {"oid": "1" * 40, "lfs": {"oid": sha256(body), "size": size, "pointerSize": 130}}
        return row

    def reply_file(self, repo, file):
        body = self.server.repos[repo][file]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            return self.reply(200, body, headers)
        if file in self.server.down:
            return self.reply(500, headers={"Retry-After": "0"})
        self.server.fetched.append(file)
        if self.server.spoilt.get(file):
            self.server.spoilt[file] -= 1
            body = body[::-1]
        ranged = (self.headers.get("Range") or "").removeprefix("bytes=")
        start, _, last = ranged.partition("-")
        start, stop = int(start or 0), min(int(last or len(body)) + 1, len(body))
        self.server.sent[file] = stop - start
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        cut = self.server.cuts.pop(file, None)
        if cut is not None:  # and the file cannot be had any more, so that the client gives up soon
            self.server.down.add(file)
        self.reply(206 if ranged else 200, body[start:stop], headers, cut=cut)

    def reply_json(self, value, headers=None):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def reply(self, status, body=b"", headers=None, error=None, message=None, cut=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        headers |= {"X-Error-Code": error} if error else {}
        headers |= {"X-Error-Message": message} if message else {}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args):
        pass


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve(handler=Hub):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.repos = {f"models/{name}": dict(MODEL) for name in ("org/tiny", "org/gated", LLAMA3_8B)}
    httpd.repos["datasets/org/pairs"] = {"README.md": b"# Pairs\n", "data/train.jsonl": ROWS, "data/test.jsonl": ROWS}
    httpd.pretended_sizes, httpd.fetched, httpd.sent = {}, [], {}
    httpd.tokens_in_store, httpd.tokens_at_hub, httpd.leads_to, httpd.pages_at = [], [], None, None
    httpd.private, httpd.revisions = set(), {"main", COMMIT}
    httpd.cuts, httpd.down, httpd.spoilt, httpd.busy = {}, set(), {}, {}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture
def server():
    with serve() as httpd:
        yield httpd


@pytest.fixture
def second_server():
    with serve() as httpd:
        yield httpd


@pytest.fixture
def tune(tmp_path, monkeypatch, capsys):
    """Runs one command line in this process; returns its status, its output and its one line of error."""
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()

    def run(*words):
        status = cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("tune: error: ")]
        assert len(errors) == (status != 0) and (status == 0 or err.rstrip().endswith(errors[0])), err
        return status, out, "".join(errors)

    return run


@pytest.fixture
def download(tune, server):
    """The same for `tune download` with the server as its endpoint."""
    return lambda *words: tune("download", *words, "--endpoint", server.url)


@pytest.fixture
def download_alone(server, tmp_path):
    """Runs `tune download` in a process of its own: the client reads its environment when it is imported."""
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")} | own

    def run(*words, command=(TUNE, "download"), **more):
        result = subprocess.run([*command, *words], env=env | more, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in result.stderr, result.stderr
        return result.returncode, result.stdout, result.stderr

    return run


def names(folder):
    """The files in a folder, without bookkeeping."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if path.parts[0] != ".cache"}


def succeeds(result):
    status, out, err = result
    assert status == 0, err
    return out


def fails_with(result):
    status, _, error = result
    assert status == 2
    return error


# What comes


def test_a_download_holds_what_the_hub_has_and_knows_where_it_came_from(download, server, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    for name in KEPT:
        assert (tmp_path / "m" / name).read_bytes() == MODEL[name]
    assert json.loads((tmp_path / "m" / REPO_ID_FILE).read_text()) == {"repo_id": "org/tiny", "revision": COMMIT}
    assert set(server.fetched) == KEPT  # what is left out is not fetched and deleted, but never asked for


def test_a_download_tells_its_files_and_ends_with_the_command_that_trains_it(download, tmp_path):
    lines = succeeds(download(LLAMA3_8B, "--output-dir", tmp_path / "a b")).splitlines()
    assert "     2.9 KiB  model-00001-of-00002.safetensors" in lines
    assert "     6.0 KiB  together, 5 files" in lines
    assert any("original/consolidated.00.pth" in line and "pytorch_model.bin" in line for line in lines)
    recipe = "recipes/lora_dpo_single_device"
    expected = ["tune", "run", recipe, "--config", "configs/llama3_8b.yaml"]
    assert shlex.split(lines[-1]) == [*expected, f"checkpointer.checkpoint_dir={tmp_path}/a b"]


def test_the_script_in_tools_and_the_endpoint_of_the_environment_do_the_same(download_alone, tmp_path):
    script = (sys.executable, ROOT / "tools/download.py")
    succeeds(download_alone(LLAMA3_8B, "--output-dir", tmp_path / "m", command=script))
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}


def test_ignore_patterns_replace_the_default_choice(download, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "all", "--ignore-patterns"))
    assert names(tmp_path / "all") == MODEL.keys() | {REPO_ID_FILE}
    succeeds(download("org/tiny", "--output-dir", tmp_path / "bin", "--ignore-patterns", "*.safetensors", "original/*"))
    few = {"config.json", "model.safetensors.index.json", "pytorch_model.bin"}
    assert names(tmp_path / "bin") == few | {REPO_ID_FILE}


def test_a_data_set_comes_whole_and_is_read_from_its_folder(download, server, tmp_path):
    out = succeeds(download("org/pairs", "--repo-type", "dataset", "--output-dir", tmp_path / "d"))
    assert names(tmp_path / "d") == set(server.repos["datasets/org/pairs"])
    assert out.rstrip().endswith(f" dataset.source={tmp_path}/d")
    for split in ("train", "test"):
        assert list(read_rows(str(tmp_path / "d"), split=split)) == PAIRS


# Going on


STREAM = """
import json, sys
import torch
from pairtune.config import keys
from pairtune.process.dist import World
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.tokenizer.hf import hf_tokenizer

def steps(source):
    world = World(torch.device("cpu"))
    block = keys.ROWS | keys.STREAM | {"source": source, "val_fraction": None, "streaming": True, "shuffle_buffer": 8}
    read = block, keys.ROWS | {"source": None}, hf_tokenizer(sys.argv[1]), world, 32, None
    return Steps(read_train_and_held_out(*read)[0], 4, 4, world, seed=0)

folder, whole, cut, again = steps(sys.argv[2]), *(steps("org/many") for _ in range(3))
expected = [folder.pairs(step) for step in range(15)]
assert [whole.pairs(step) for step in range(15)] == expected
[cut.pairs(step) for step in range(7)]
again.load(json.loads(json.dumps(cut.state())))
assert [again.pairs(step) for step in range(7, 15)] == expected[7:]
print(sorted({pair.row for pairs in expected[:10] for pair in pairs}) == [*range(40)])
"""


def test_a_data_set_of_the_hub_is_streamed_as_its_files_are_and_goes_on_from_any_step(download_alone, server, tmp_path):
    rows = [json.dumps({"prompt": f"w{3 + i}", "chosen": " w4 w5", "rejected": " w5"}) + "\n" for i in range(40)]
    files = {"train-0.jsonl": "".join(rows[:25]), "train-1.jsonl": "".join(rows[25:]), "test.jsonl": rows[0] * 9}
    server.repos["datasets/org/many"] = {f"data/{name}": text.encode() for name, text in files.items()}
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / "data" / name).write_text(text)
    save_tokenizer(tmp_path, 100)
    script = (sys.executable, "-c", STREAM)
    told = succeeds(download_alone(str(tmp_path), str(tmp_path / "data"), command=script))
    assert "dataset.source=org/many: read from the Hugging Face Hub" in told and told.endswith("True\n")
    assert set(server.fetched) == {"data/train-0.jsonl", "data/train-1.jsonl"}  # no other split


def test_the_same_command_again_fetches_only_what_is_missing(download, server, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    (tmp_path / "m/config.json").unlink()
    server.fetched.clear()
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert (tmp_path / "m/config.json").read_bytes() == MODEL["config.json"]
    assert server.fetched == ["config.json"]


def test_a_connection_that_breaks_off_leaves_what_arrived_and_the_same_command_fetches_the_rest(
    download, server, tmp_path
):
    shard = "model-00002-of-00002.safetensors"
    body = server.repos["models/org/tiny"][shard] = bytes(range(256)) * (3 * CHUNK // 512)  # 1.5 chunks
    server.cuts[shard] = CHUNK + 1000
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "org/tiny" in error and not (tmp_path / "m" / shard).exists()
    assert not (tmp_path / "m" / REPO_ID_FILE).exists()  # the mark of a whole download
    server.down.clear()
    server.fetched.clear()
    out = succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "15.0 MiB  together, 5 files, of which 10.0 MiB are there" in out
    assert server.fetched == [shard] and server.sent[shard] == len(body) - CHUNK
    assert (tmp_path / "m" / shard).read_bytes() == body
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    assert not list((tmp_path / "m/.cache").rglob("model*"))  # no part is left behind


@pytest.mark.parametrize("damaged", [b"TWO" * 1000, b"two" * 999, b""])
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_file_with_other_bytes_is_named_and_fetched_again(download, server, tmp_path, name, damaged):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    (tmp_path / "m" / name).write_bytes(damaged)
    server.fetched.clear()
    assert f"{tmp_path}/m/{name}: is not the repository's" in succeeds(
        download("org/tiny", "--output-dir", tmp_path / "m")
    )
    assert server.fetched == [name] and (tmp_path / "m" / name).read_bytes() == MODEL[name]


def test_what_arrives_with_a_wrong_checksum_is_fetched_once_more_and_then_an_error(download, server, tmp_path):
    shard = "model-00001-of-00002.safetensors"
    server.spoilt[shard] = 2
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert shard in error and sha256(MODEL[shard]) in error and not (tmp_path / "m" / shard).exists()
    server.spoilt[shard] = 1
    out = succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert f"{shard}: what arrived has not the checksum" in out
    assert (tmp_path / "m" / shard).read_bytes() == MODEL[shard]


def test_two_downloads_into_one_folder_are_one_too_many(download, tmp_path):
    lock = tmp_path / "m" / BOOKKEEPING / "lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        assert "another `tune download`" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))


# Another revision


SINGLE = {"config.json": b'{"new": 1}', "model.safetensors": b"one and two"}


def test_another_revision_takes_the_place_of_the_first_and_a_run_reads_its_weights(download, server, tmp_path):
    server.repos["models/org/tiny"]["chat_template.jinja"] = b"old"
    folder = tmp_path / "m"
    succeeds(download("org/tiny", "--output-dir", folder))
    (folder / "notes.txt").write_text("mine")
    server.repos["models/org/tiny"] = SINGLE
    told = succeeds(download("org/tiny", "--output-dir", folder, "--dry-run"))
    gone = sorted({*KEPT, "chat_template.jinja"} - SINGLE.keys())
    assert f"Fetched earlier and not in this revision, to be removed:\n  {', '.join(gone)}\n" in told
    assert "not of this download, left as they are:\n  notes.txt\n" in told
    assert (folder / "chat_template.jinja").is_file()
    succeeds(download("org/tiny", "--output-dir", folder))
    assert names(folder) == {*SINGLE, "notes.txt", REPO_ID_FILE}
    assert find_weights(str(folder)) == ["model.safetensors"]
    server.repos["models/org/tiny"] = dict(MODEL)  # and back
    succeeds(download("org/tiny", "--output-dir", folder))
    assert names(folder) == {*KEPT, "notes.txt", REPO_ID_FILE}
    assert len(find_weights(str(folder))) == 2


def test_another_revision_that_broke_off_leaves_nothing_of_the_first(download, server, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    server.repos["models/org/tiny"] = dict(SINGLE)
    server.down.add("model.safetensors")
    fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") <= {"config.json", REPO_ID_FILE}
    with pytest.raises(UserError, match="holds no weights"):
        find_weights(str(tmp_path / "m"))
    server.repos["models/org/tiny"] = {"README.md": b"of a third"}  # what came of the second goes, too
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == {"README.md", REPO_ID_FILE}


def test_rows_of_another_revision_are_not_read_along(download, server, tmp_path):
    words = ("org/pairs", "--repo-type", "dataset", "--output-dir", tmp_path / "d")
    server.repos["datasets/org/pairs"] = {f"data/train-0000{n}-of-00002.jsonl": ROWS for n in range(2)}
    succeeds(download(*words))
    server.repos["datasets/org/pairs"] = {"data/train-00000-of-00001.jsonl": ROWS}
    succeeds(download(*words))
    assert list(read_rows(str(tmp_path / "d"), split="train")) == PAIRS


def test_what_was_fetched_at_the_same_revision_with_other_patterns_stays(download, server, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m", "--ignore-patterns"))
    server.fetched.clear()
    for _ in range(2):
        out = succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
        assert "to be removed" not in out and server.fetched == []
        assert names(tmp_path / "m") == MODEL.keys() | {REPO_ID_FILE}
    server.repos["models/org/tiny"]["pytorch_model.bin"] = b"of another revision"
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == MODEL.keys() - {"pytorch_model.bin"} | {REPO_ID_FILE}


@pytest.mark.parametrize(
    "repo, own",
    [
        (SINGLE, "model.safetensors.index.json"),  # a run would read it first
        (SINGLE, "model.safetensors"),  # would be overwritten
        ({"config.json": b"{}", "pytorch_model.bin": b"theirs"}, "model.safetensors"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"theirs"}, "adapter_model.safetensors"),
    ],
)
def test_weights_of_a_user_are_refused_and_not_touched(download, server, tmp_path, repo, own):
    server.repos["models/org/tiny"] = repo
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / own).write_bytes(b"mine")
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert f"{tmp_path}/m: in the way: {own}; not written by `tune download`" in error and "--output-dir DIR" in error
    assert names(tmp_path / "m") == {own} and (tmp_path / "m" / own).read_bytes() == b"mine"
    (tmp_path / "m" / own).unlink()
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))


def test_weights_of_a_user_that_a_run_does_not_find_first_are_named_and_stay(download, server, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"mine")
    assert "left as they are:\n  pytorch_model.bin\n" in succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert (tmp_path / "m/pytorch_model.bin").read_bytes() == b"mine"


def test_a_fetched_file_that_a_user_changed_is_not_removed(download, server, tmp_path):
    server.repos["models/org/tiny"] = {**SINGLE, "chat_template.jinja": b"old"}
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    (tmp_path / "m/chat_template.jinja").write_text("mine")
    server.repos["models/org/tiny"] = dict(MODEL)
    assert "in the way: chat_template.jinja;" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert (tmp_path / "m/chat_template.jinja").read_text() == "mine"
    assert (tmp_path / "m/model.safetensors").read_bytes() == SINGLE["model.safetensors"]  # nor anything else


def test_a_file_that_was_whole_before_is_a_users_and_not_removed(download, server, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_bytes(MODEL["config.json"])
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "config.json" not in server.fetched
    server.repos["models/org/tiny"] = {"README.md": b"new"}
    assert "as they are:\n  config.json\n" in succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == {"config.json", "README.md", REPO_ID_FILE}


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"repo_id": "org/tiny"}\n', "PK\n"])
def test_a_damaged_record_is_named(download, tmp_path, text):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    (tmp_path / "m" / RECORD).write_text(text)
    assert RECORD in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))


def test_a_record_that_leads_out_of_the_folder_is_refused(download, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    (tmp_path / "outside").write_text("mine")
    with (tmp_path / "m" / RECORD).open("a") as record:
        record.write(json.dumps({"name": "../outside", "size": 4, "checksum": ""}) + "\n")
    assert "../outside" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_row_of_the_record_that_broke_off_does_no_harm(download, server, tmp_path):
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    with (tmp_path / "m" / RECORD).open("a") as record:
        record.write('{"name": "conf')
    server.repos["models/org/tiny"] = dict(SINGLE)
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == SINGLE.keys() | {REPO_ID_FILE}


def test_what_a_failed_download_did_not_bring_is_a_users(download, server, tmp_path):
    fails_with(download("org/gated", "--output-dir", tmp_path / "m"))
    (tmp_path / "m/config.json").write_bytes(b"mine")
    error = fails_with(download("org/gated", "--output-dir", tmp_path / "m", "--hf-token", "right"))
    assert "in the way: config.json;" in error and (tmp_path / "m/config.json").read_bytes() == b"mine"
    (tmp_path / "m/config.json").unlink()
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))  # nothing of the other one is there


# What does not come


def test_a_shard_that_the_index_names_and_nobody_uploaded_is_told_before_the_weights_come(download, server, tmp_path):
    del server.repos["models/org/tiny"]["model-00002-of-00002.safetensors"]
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "model-00002-of-00002.safetensors" in error and "upload is incomplete" in error
    assert server.fetched == ["model.safetensors.index.json"]
    assert not (tmp_path / "m" / REPO_ID_FILE).exists()


def test_a_gated_model_says_where_its_licence_is_and_how_to_give_a_token(download, tmp_path):
    error = fails_with(download("org/gated", "--output-dir", tmp_path / "m"))
    assert "/org/gated, then give your token" in error and "--hf-token" in error and "hf auth login" in error
    error = fails_with(download("org/gated", "--output-dir", tmp_path / "m", "--hf-token", "wrong"))
    assert "/org/gated, wait where" in error and "--hf-token" in error


@pytest.mark.parametrize("words, env", [(["--hf-token", "right"], {}), ([], {"HF_TOKEN": "right"})])
def test_a_token_from_the_option_or_the_environment_opens_a_gated_model_and_stays_at_the_hub(
    download, server, monkeypatch, tmp_path, words, env
):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    succeeds(download("org/gated", "--output-dir", tmp_path / "m", *words))
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    assert server.tokens_in_store == [""] * 3  # two shards and the tokenizer


@pytest.mark.parametrize("padding", ["{}\n", "{}\r\n", " {} ", "\t{}"])
@pytest.mark.parametrize("where", ["option", "environment", "file"])
def test_a_token_is_sent_without_what_surrounds_it(download, server, monkeypatch, tmp_path, where, padding):
    token, words = padding.format("right"), []
    if where == "option":
        words = ["--hf-token", token]
    elif where == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        (tmp_path / "no_token").write_bytes(token.encode())
    succeeds(download("org/gated", "--output-dir", tmp_path / "m", *words))
    assert {*server.tokens_at_hub} == {"right"}


@pytest.mark.parametrize("token", ["", " \n", "hush\nhush", "hush hush", "hüsh", "hush…", "hush\x00", "echo"])
@pytest.mark.parametrize("where", ["option", "environment", "file"])
def test_a_token_that_cannot_be_sent_is_said_and_never_shown(download, monkeypatch, tmp_path, where, token):
    words = ["org/tiny", "--output-dir", tmp_path / "m"]
    if where == "environment" and "\x00" not in token:
        monkeypatch.setenv("HF_TOKEN", token)
    elif where == "file":
        (tmp_path / "no_token").write_text(token)
    else:
        words += ["--hf-token", token]
    status, out, error = download(*words)
    assert "hush" not in out + error and "hüsh" not in out + error and "echo" not in out + error
    if token == "echo":  # a server that sends it back
        assert "***" in error
    elif where == "option" or token.strip():
        cleaned = token.replace("\n", "") if where != "option" else token  # as the client does with stored ones
        accepted = cleaned == "hushhush"
        assert accepted or (status == 2 and ("no token has" in error or "--hf-token: is empty" in error)), error
    else:  # an empty variable is none
        assert status == 0, error


def test_a_stored_token_that_cannot_be_read_is_said(download, tmp_path):
    (tmp_path / "no_token").write_bytes(b"\xffhush")
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "cannot be read (UnicodeDecodeError)" in error and "hush" not in error


@pytest.mark.parametrize("known", [False, True])  # as a host of the Hub's, to which its client sends tokens
def test_a_token_goes_to_no_other_host(download_alone, server, second_server, tmp_path, known):
    server.leads_to = second_server.url
    env = {"HF_TOKEN": "right", "HF_ENDPOINT": second_server.url if known else NOBODY}
    words = ["--output-dir", str(tmp_path / "m"), "--endpoint", server.url]
    status, _, error = download_alone(LLAMA3_8B, *words, **env)
    assert status == 0, error
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    assert {*second_server.tokens_at_hub, *second_server.tokens_in_store} == {""}
    status, _, error = download_alone("org/gated", "--output-dir", str(tmp_path / "g"), *words[2:], **env)
    assert status == 2 and f"a token goes to {server.url} only" in error


@pytest.mark.parametrize("at_home", [True, False])
def test_a_list_in_pages_comes_whole_and_its_pages_elsewhere_get_no_token(
    download, server, second_server, tmp_path, at_home
):
    server.pages_at = second_server.pages_at = server.url if at_home else second_server.url
    succeeds(download("org/tiny", "--output-dir", tmp_path / "m", "--hf-token", "right"))
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    assert {*server.tokens_at_hub} == {"right"} and {*second_server.tokens_at_hub} == (set() if at_home else {""})


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("part", ["api/models/org/tiny", "store/models/org/tiny@model-00001", "config.json"])
def test_a_busy_hub_is_asked_again(download, server, monkeypatch, tmp_path, part, status):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.busy[part] = status, 2
    out = succeeds(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert names(tmp_path / "m") == KEPT | {REPO_ID_FILE}
    assert len(waits) == 2 and ("asking again in 0 s" in out or status == 429)


def test_a_hub_that_stays_busy_is_left_after_some_waits(download, server, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.busy["api/models/org/tiny"] = 503, 100
    assert "answers with an error, try later: Server error '503" in fails_with(
        download("org/tiny", "--output-dir", tmp_path / "m")
    )
    assert waits == [0] * len(hub_http.WAITS) and list(hub_http.WAITS) == sorted(hub_http.WAITS)


@pytest.mark.parametrize("status", [403, 404, 416])
def test_a_file_store_that_refuses_is_named_and_not_the_token(download, server, tmp_path, status):
    server.busy["store/"] = status, 100
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert (
        f"localhost:{server.server_port}, to which {server.url} leads, answers {status}" in error
        and "your token" not in error
    )


def test_a_hub_that_forbids_without_a_token_does_not_blame_one(download, server, tmp_path):
    server.busy["api/models"] = 403, 1
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "answers 403 without a token" in error and "forbids it to your token" not in error


@pytest.mark.parametrize(
    "words, says",
    [
        (["org/nothing"], "org/nothing: no such model"),
        (["org/nothing", "--hf-token", "right"], "org/nothing: no such model"),
        (["org/pairs"], "a data set: --repo-type dataset"),
        (["org/tiny", "--repo-type", "dataset"], "org/tiny: no such data set"),
        (["org/tiny", "--revision", "v9"], "org/tiny has no revision v9"),
        (["org/tiny", "--hf-token", "unknown"], "may be mistyped, expired or revoked"),
        (["org/tiny", "--hf-token", "narrow"], "403 Forbidden: Please enable access to public gated repositories"),
        (["a/b/c"], "a model is named owner/name"),
        (["org/tiny", "--revision", "1", "--source", "kaggle"], "the handle ends with the version"),
        (["org/tiny", "--dry-run", "--source", "kaggle"], "--endpoint: has no effect on --source kaggle"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_wrong_name_or_token_is_one_sentence(download, tmp_path, words, says, dry_run):
    assert says in fails_with(download(*words, *dry_run, "--output-dir", tmp_path / "m"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "endpoint, says",
    [
        (NOBODY, f"{NOBODY} cannot be reached (ConnectError"),
        ("{server}/elsewhere", "does not answer as the Hub does"),
        ("huggingface.co", "must be a URL"),
        ("http://[::1", "must be a URL"),
        ("https://me:hush@mirror.example", "endpoint at mirror.example: a URL with a password"),
        ("https://www.modelscope.cn", "modelscope download --model org/tiny --local_dir /tmp/tiny"),
    ],
)
def test_an_endpoint_that_is_no_hub_is_named(tune, server, tmp_path, endpoint, says):
    words = ["org/tiny", "--output-dir", tmp_path / "m", "--endpoint", endpoint.format(server=server.url)]
    assert says in fails_with(tune("download", *words))
    assert not (tmp_path / "m").exists()


def test_offline_mode_is_named(download_alone, tmp_path):
    assert "HF_HUB_OFFLINE is set" in fails_with(download_alone("org/tiny", "--dry-run", HF_HUB_OFFLINE="1"))


def test_a_model_larger_than_the_disk_is_refused_before_its_first_byte(download, server, tmp_path):
    server.pretended_sizes["config.json"] = 2**60
    assert "1048576.0 TiB needed" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert server.fetched == []


def test_a_folder_that_cannot_be_written_names_the_option(download, tmp_path):
    (tmp_path / "file").write_text("")
    assert "another folder: --output-dir" in fails_with(download("org/tiny", "--output-dir", tmp_path / "file/m"))


def test_another_model_in_the_folder_is_left_alone(download, server, tmp_path):
    succeeds(download("org/gated", "--output-dir", tmp_path / "m", "--hf-token", "right"))
    succeeds(download("org/pairs", "--output-dir", tmp_path / "d", "--repo-type", "dataset"))
    server.fetched.clear()
    assert "holds org/gated" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "holds org/pairs" in fails_with(download("org/tiny", "--output-dir", tmp_path / "d"))
    assert server.fetched == []


def test_a_name_that_leads_out_of_the_folder_is_refused(download, server, tmp_path):
    server.repos["models/org/tiny"]["../outside.json"] = b"{}"
    assert "../outside.json" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert server.fetched == [] and not (tmp_path / "outside.json").exists()


# Before anything comes


def test_a_dry_run_tells_the_plan_and_fetches_nothing(download, server, tmp_path):
    words = (LLAMA3_8B, "--output-dir", tmp_path / "m")
    planned = succeeds(download(*words, "--dry-run"))
    assert server.fetched == [] and not (tmp_path / "m").exists()
    fetched = succeeds(download(*words))
    done = f"{tmp_path}/m is complete, every file as the repository states it\n"
    assert done in fetched and fetched.replace(done, "") == planned  # which the test above reads
    assert "6.0 KiB are there" in succeeds(download(*words, "--dry-run"))


def test_a_dry_run_reads_config_json_where_no_config_names_the_id(download, server, tmp_path):
    llama = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    llama |= {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 128}
    line = f"recipes/lora_dpo_single_device checkpointer.checkpoint_dir={tmp_path}/m dataset.source=PAIRS\n"
    quantized = llama | {"quantization_config": {"quant_method": "awq"}}
    for model, words in ((llama, line), (quantized, "cannot be trained: .*quantization_config=awq")):
        server.repos["models/org/tiny"]["config.json"] = json.dumps(model).encode()
        out = succeeds(download("org/tiny", "--output-dir", tmp_path / "m", "--dry-run"))
        assert re.search(words, out)
    assert server.fetched == ["config.json"] * 2 and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "repo, name", [(LLAMA3_8B, "llama3_8b"), (LLAMA3_2_1B, "llama3_2_1b"), (TINYLLAMA, "tinyllama_1_1b")]
)
def test_a_dry_run_without_a_network_tells_what_follows_from_the_id(tune, tmp_path, repo, name):
    words = ["download", repo, "--output-dir", tmp_path / "m", "--endpoint", NOBODY, "--dry-run"]
    status, out, error = tune(*words)
    assert status == 2 and f"{NOBODY} cannot be reached" in error
    assert f"model {repo} (main) from {NOBODY}, to {tmp_path}/m" in out
    assert "Left out: *.msgpack" in out and "*.bin" in out
    assert f"--config configs/{name}.yaml checkpointer.checkpoint_dir={tmp_path}/m" in out
    assert not (tmp_path / "m").exists()


def test_a_dry_run_offline_prints_its_plan_and_one_line_of_error(download_alone):
    status, out, error = download_alone(LLAMA3_2_1B, "--dry-run", HF_HUB_OFFLINE="1")
    assert status == 2 and len(error.splitlines()) == 1 and "HF_HUB_OFFLINE is set" in error
    assert f"model {LLAMA3_2_1B} (main) from " in out and "Left out: *.msgpack" in out
    assert "--config configs/llama3_2_1b.yaml" in out


@pytest.mark.parametrize(
    "files, left_out",
    [
        (  # Llama 3: its tokenizer lies among the weights that are left out
            "model.safetensors.index.json model-00001-of-00004.safetensors original/consolidated.00.pth "
            "original/params.json original/tokenizer.model tokenizer.json",
            "original/consolidated.00.pth",
        ),
        (  # Mistral
            "consolidated.safetensors model-00001-of-00003.safetensors pytorch_model-00001-of-00002.bin "
            "pytorch_model.bin.index.json tokenizer.model.v3",
            "consolidated.safetensors pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json",
        ),
        (  # GPT-2
            "64.tflite flax_model.msgpack merges.txt model.safetensors onnx/decoder_model.onnx onnx/config.json "
            "pytorch_model.bin rust_model.ot tf_model.h5 vocab.json",
            "64.tflite flax_model.msgpack onnx/decoder_model.onnx pytorch_model.bin rust_model.ot tf_model.h5",
        ),
        (
            "pytorch_model.bin tf_model.h5 original/x.pth",
            "tf_model.h5",
        ),  # no safetensors: .bin and .pth are the weights
        ("adapter_model.safetensors adapter_config.json", ""),  # an adapter is no second copy
        (  # an adapter and what its training left
            "adapter_config.json adapter_model.bin adapter_model.safetensors checkpoint-100/adapter_model.safetensors "
            "checkpoint-100/optimizer.pt optimizer.pt tokenizer.json training_args.bin",
            "adapter_model.bin checkpoint-100/adapter_model.safetensors checkpoint-100/optimizer.pt optimizer.pt "
            "training_args.bin",
        ),
        (  # a model of which steps on the way were kept
            "config.json pytorch_model.bin runs/checkpoint-5/config.json runs/checkpoint-5/rng_state_0.pth "
            "checkpoint_files/a.json",
            "runs/checkpoint-5/config.json runs/checkpoint-5/rng_state_0.pth",
        ),
        ("README.md checkpoint-100/model.safetensors", ""),  # nothing else is here: leave the choice to people
        (  # shards under the names of .bin's
            "consolidated.safetensors model.safetensors.index.json pytorch_model-00001-of-00002.bin "
            "pytorch_model-00001-of-00002.safetensors pytorch_model.bin.index.json",
            "consolidated.safetensors pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json",
        ),
        ("part/model.safetensors part/extra.bin", ""),  # not where a checkpointer looks: leave the choice to people
    ],
)
def test_what_dpo_does_not_read_is_left_out(files, left_out):
    assert unread(files.split()) == left_out.split()


def test_the_file_that_names_the_model_is_torchtunes():
    from torchtune.training.checkpointing._utils import REPO_ID_FNAME

    assert f"{REPO_ID_FNAME}.json" == REPO_ID_FILE


# Which config


def example(path):
    """The ids that a config's comments download and the words of their first `tune run`, read line by line."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    ids = [line.split()[2] for line in lines if line.startswith("tune download ")]
    start = next((n for n, line in enumerate(lines) if line.startswith("tune run ")), len(lines))
    words = []
    for line in lines[start:]:
        words += line.removesuffix("\\").split()
        if not line.endswith("\\"):
            break
    return ids, words


def test_each_id_that_a_config_names_gets_the_command_of_its_comments():
    commands = {}
    for path in own("config").values():
        ids, words = example(path)
        for repo_id in ids:
            commands.setdefault(repo_id, words)
    assert "recipes/qlora_dpo_distributed" in commands["meta-llama/Llama-3.1-405B-Instruct"]
    assert "configs/llama3_8b.yaml" in commands["princeton-nlp/Llama-3-Base-8B-SFT"]  # whose own holds no model
    for repo_id, words in commands.items():
        command = next_command(hub_http.Source(repo_id), Path("/f"), lambda name: pytest.fail("the id is enough"))
        words = [word for word in words if not word.startswith("checkpointer.checkpoint_dir=")]
        assert shlex.split(command.splitlines()[-1]) == [*words, "checkpointer.checkpoint_dir=/f"]


@pytest.mark.parametrize(
    "base, recipe, name",
    [
        (LLAMA3_8B, "lora_dpo_single_device", "configs/llama3_8b.yaml"),
        ("meta-llama/Llama-3.1-405B-Instruct", "qlora_dpo_distributed", "configs/llama3_1_405b.yaml"),
        ("EleutherAI/pythia-2.8b", "lora_dpo_distributed", "configs/pythia_2_8b_hh.yaml"),  # full_ in its comments
        ("org/unknown", "lora_dpo_single_device", None),
        (None, "lora_dpo_single_device", None),
    ],
)
def test_an_adapter_is_trained_on_with_the_recipe_of_its_base_model(download, server, tmp_path, base, recipe, name):
    adapter = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_dora": False}
    weights = {"adapter_model.safetensors": b"x", "checkpoint-100/optimizer.pt": b"o" * 500}
    server.repos["models/org/tiny"] = {"adapter_config.json": json.dumps(adapter).encode(), **weights}
    *_, says, line = succeeds(download("org/tiny", "--output-dir", tmp_path / "a")).splitlines()
    assert names(tmp_path / "a") == {"adapter_config.json", "adapter_model.safetensors", REPO_ID_FILE}
    assert says.startswith(f"Train on from this adapter of {base or 'a model that it does not name'} (")
    assert (f"`tune download {base}`" in says) == (base is not None)
    overrides = [f"adapter={tmp_path}/a", "reference=start", "lora.rank=4", "lora.alpha=16"]
    model = ["--config", name] if name else ["checkpointer.checkpoint_dir=MODEL", "dataset.source=PAIRS"]
    assert shlex.split(line) == ["tune", "run", f"recipes/{recipe}", *model, *overrides]
    if name:
        cfg = config.load("lora", read_recipe(recipe)[1], [find("config", name)], overrides)
        assert cfg.lora.rank == 4 and cfg.reference.name == "start"
