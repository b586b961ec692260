"""Claims about `tune download`, against a small server that speaks the Hub's protocol to the real client."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pairtune import cli, hub

ROOT = Path(cli.__file__).parents[1]
TUNE = Path(sys.executable).with_name("tune")
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


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: a model's listing is open to all, a gated model's files need its token."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        if path.count("/") == 1:
            path += "/revision/main"
        owner, name, verb, revision, *file = path.split("/", 4)
        files = self.server.models.get(f"{owner}/{name}")
        if files is None:
            return self.reply(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.reply(404, error="RevisionNotFound")
        sizes = {file: self.server.pretended_sizes.get(file, len(body)) for file, body in files.items()}
        if verb == "revision":
            siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
            return self.reply_json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
        if verb == "tree":
            rows = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in sizes.items()]
            return self.reply_json(rows)
        if name == "gated" and self.headers.get("Authorization") != "Bearer right":
            return self.reply(403, error="GatedRepo")
        self.server.fetched += file
        body = files[file[0]]
        self.reply(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body=b"", headers=None, error=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {}), **({"X-Error-Code": error} if error else {})}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    httpd.models = {"org/tiny": dict(MODEL), "org/gated": dict(MODEL)}
    httpd.pretended_sizes, httpd.fetched = {}, []
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def download(server, tmp_path):
    """Runs `tune download` in a process of its own: the client reads HF_ENDPOINT when it is imported."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")} | own

    def run(*words, command=(TUNE, "download"), **more):
        result = subprocess.run([*command, *words], env=env | more, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in result.stderr, result.stderr
        return result

    return run


def names(folder):
    return set(hub.sizes(folder))


def fails_with(result):
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("tune: error: ")]
    assert result.stderr.rstrip().endswith(line)
    return line


def test_a_download_holds_what_the_hub_has_and_knows_where_it_came_from(download, server, tmp_path):
    result = download("org/tiny", "--output-dir", tmp_path / "m")
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "m") == KEPT | {hub.REPO_ID_FILE}
    for name in KEPT:
        assert (tmp_path / "m" / name).read_bytes() == MODEL[name]
    assert json.loads((tmp_path / "m" / hub.REPO_ID_FILE).read_text()) == {"repo_id": "org/tiny"}
    assert set(server.fetched) == KEPT  # what is left out is not fetched and deleted, but never asked for


def test_a_download_ends_with_its_files_and_the_next_command(download, tmp_path):
    out = download("org/tiny", "--output-dir", tmp_path / "m").stdout
    assert "2.9 KiB  model-00001-of-00002.safetensors" in out and "original/consolidated.00.pth" in out
    assert out.rstrip().endswith(f"checkpointer.checkpoint_dir={tmp_path}/m")
    assert out.rstrip().splitlines()[-1].strip().startswith("tune run ")


def test_the_script_in_tools_downloads_the_same(download, tmp_path):
    script = (sys.executable, ROOT / "tools/download.py")
    assert download("org/tiny", "--output-dir", tmp_path / "m", command=script).returncode == 0
    assert names(tmp_path / "m") == KEPT | {hub.REPO_ID_FILE}


def test_ignore_patterns_replace_the_default_choice(download, tmp_path):
    assert download("org/tiny", "--output-dir", tmp_path / "all", "--ignore-patterns").returncode == 0
    assert names(tmp_path / "all") == MODEL.keys() | {hub.REPO_ID_FILE}
    patterns = ["--ignore-patterns", "*.safetensors", "original/*"]
    assert download("org/tiny", "--output-dir", tmp_path / "bin", *patterns).returncode == 0
    assert names(tmp_path / "bin") == {
        "config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        hub.REPO_ID_FILE,
    }


def test_the_same_command_again_fetches_only_what_is_missing(download, server, tmp_path):
    download("org/tiny", "--output-dir", tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    server.fetched.clear()
    assert download("org/tiny", "--output-dir", tmp_path / "m").returncode == 0
    assert (tmp_path / "m/config.json").read_bytes() == MODEL["config.json"]
    assert server.fetched.count("config.json") == 2  # its HEAD and its GET
    assert all(server.fetched.count(name) <= 1 for name in KEPT - {"config.json"})


def test_a_shard_that_the_index_names_and_nobody_uploaded_is_an_error(download, server, tmp_path):
    del server.models["org/tiny"]["model-00002-of-00002.safetensors"]
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert "model-00002-of-00002.safetensors" in error and "upload is incomplete" in error
    assert not (tmp_path / "m" / hub.REPO_ID_FILE).exists()  # the mark of a whole download


def test_a_gated_model_says_where_its_licence_is_and_how_to_give_a_token(download, tmp_path):
    error = fails_with(download("org/gated", "--output-dir", tmp_path / "m"))
    assert "/org/gated" in error and "--hf-token" in error and "hf auth login" in error
    assert fails_with(download("org/gated", "--output-dir", tmp_path / "m", "--hf-token", "wrong")) == error


@pytest.mark.parametrize("words, env", [(["--hf-token", "right"], {}), ([], {"HF_TOKEN": "right"})])
def test_a_gated_model_comes_with_a_token_from_the_option_or_the_environment(download, tmp_path, words, env):
    assert download("org/gated", "--output-dir", tmp_path / "m", *words, **env).returncode == 0
    assert names(tmp_path / "m") == KEPT | {hub.REPO_ID_FILE}


@pytest.mark.parametrize(
    "words, says",
    [
        (["org/nothing"], "org/nothing: no such model"),
        (["org/tiny", "--revision", "v9"], "org/tiny has no revision v9"),
        (["a/b/c"], "a model is named owner/name"),
        (["org/tiny", "--revision", "1", "--source", "kaggle"], "the handle ends with the version"),
    ],
)
def test_a_wrong_name_is_one_sentence(download, tmp_path, words, says):
    assert says in fails_with(download(*words, "--output-dir", tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_without_a_network_the_address_that_failed_is_named(download, tmp_path):
    error = fails_with(download("org/tiny", "--output-dir", tmp_path / "m", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached" in error
    assert "cannot be reached" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m", HF_HUB_OFFLINE="1"))


def test_a_model_larger_than_the_disk_is_refused_before_its_first_byte(download, server, tmp_path):
    server.pretended_sizes["config.json"] = 2**60
    assert "1048576.0 TiB needed" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert server.fetched == []


def test_a_folder_that_cannot_be_written_names_the_option(download, tmp_path):
    (tmp_path / "file").write_text("")
    assert "another folder: --output-dir" in fails_with(download("org/tiny", "--output-dir", tmp_path / "file/m"))


def test_another_model_in_the_folder_is_left_alone(download, server, tmp_path):
    download("org/gated", "--output-dir", tmp_path / "m", "--hf-token", "right")
    server.fetched.clear()
    assert "holds org/gated" in fails_with(download("org/tiny", "--output-dir", tmp_path / "m"))
    assert server.fetched == []


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
        ("part/model.safetensors part/extra.bin", ""),  # not where a checkpointer looks: leave the choice to people
    ],
)
def test_what_dpo_does_not_read_is_left_out(files, left_out):
    assert hub.unread(files.split()) == left_out.split()


def test_the_file_that_names_the_model_is_torchtunes():
    from torchtune.training.checkpointing._utils import REPO_ID_FNAME

    assert f"{REPO_ID_FNAME}.json" == hub.REPO_ID_FILE


def test_a_folder_that_a_config_expects_needs_no_override():
    for name in cli.own("config"):
        home = (cli._load_yaml(cli.own("config")[name]).get("checkpointer") or {}).get("checkpoint_dir")
        if home and str(home).startswith("/"):
            command = cli._next_command(Path(home))
            assert "checkpoint_dir" not in command and "--config CONFIG" not in command
            moved = cli._next_command(Path("/elsewhere") / Path(home).name)
            assert moved.endswith(f"checkpointer.checkpoint_dir=/elsewhere/{Path(home).name}")
            assert "--config CONFIG" not in moved
