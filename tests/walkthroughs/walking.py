"""Runs the commands of a page of docs/walkthroughs, in this process, on small stand-ins for what they name.

What a command says is run: models and data sets of the Hub are small folders under the same names, in a folder that
stands for where the reader is; sizes, steps and answers are cut down behind what is said. So a page cannot name a
command, a key or a file that is not there.
"""

import json
import re
import shlex
import shutil
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import huggingface_hub
from helpers import ROOT, SIZES, save_llama
from judge_server import serving
from test_hub import serve
from test_tokenizer import LLAMA_2, LLAMA_3, byte_level_bpe, save

from pairtune.cli.commands import load_yaml, main
from pairtune.cli.find import find

PAGES = ROOT / "docs" / "walkthroughs"
ENDPOINT = "https://api.openai.com/v1"
SMALL = ["max_steps=2", "pairs_per_step=4", "batch_size=2", "samples.max_new_tokens=4", "samples.num_prompts=1"]
SHORT = ["--max-new-tokens", "6", "device=cpu", "dtype=fp32"]  # of what answers: the last word counts


@dataclass(frozen=True)
class Command:
    """A command of a page, and the error that the page shows below it, if any."""

    words: list[str]
    error: str = ""


def commands(page: str) -> list[Command]:
    """Returns what the blocks of a page run, in order: words as a shell gives them."""
    found = []
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    for lines in (block.replace("\\\n", " ").splitlines() for language, block in fenced if not language):
        rest = iter(lines)
        for line in rest:
            if line.startswith(("tune: error: ", " ")):
                last = found.pop()
                error = f"{last.error} {line.removeprefix('tune: error: ').strip()}".strip()
                found.append(Command(last.words, error))
                continue
            while line.count("'") % 2:
                line += "\n" + next(rest)
            first, *words = shlex.split(line)
            assert first == "tune", line
            found.append(Command(words))
    return found


@dataclass
class Walk:
    """What came of a page's commands.

    Attributes:
        folder: Where the reader is.
        said: What each command printed, by its words as the page has them.
    """

    folder: Path
    said: dict[str, str] = field(default_factory=dict)

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def losses(self, run: str) -> list[float]:
        return [row["loss"] for row in self.rows(f"runs/{run}/metrics.jsonl") if "loss" in row]

    def settings(self, run: str) -> dict:
        return load_yaml(self.folder / "runs" / run / "config.yaml")

    def write(self, name: str, *rows: dict) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def walking(folder: Path, models: dict[str, dict], small: dict[str, list[str]], monkeypatch):
    """Yields a function that runs a page, and returns its Walk: among stand-ins of these models and of `rows`.

    Args:
        models: Files of a folder by the Hub's id.
        small: How runs are cut down whose first config is not cut down as SMALL says.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tune"])
    for name, value in {"LOCAL_RANK": "0", "NO_PROXY": "127.0.0.1,localhost", "WANDB_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)  # LOCAL_RANK: a distributed recipe's one process is this one
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    with serve() as hub, serving() as judge:
        hub.repos |= {f"models/{name}": files for name, files in models.items()}

        def run(page: str) -> Walk:
            walk = Walk(folder)
            for command in commands(page):
                words = [word.replace("/tmp/", f"{folder}/tmp/") for word in command.words]
                words = [judge.address if word == ENDPOINT else word for word in words]
                words += [] if command.error else on_stand_ins(words, folder, hub.url, small)
                with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
                    status = main(words)
                said = " ".join(err.getvalue().split())
                assert status == (2 if command.error else 0), f"{shlex.join(words)}\n{out.getvalue()}\n{said}"
                assert not command.error or said.startswith(f"tune: error: {command.error}"), said
                walk.said[shlex.join(command.words)] = out.getvalue()
            return walk

        yield run


def on_stand_ins(words: list[str], folder: Path, hub: str, small: dict[str, list[str]]) -> list[str]:
    """Returns what is said behind a command, so that it is small."""
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    if name == "download":
        return ["--endpoint", hub]
    if name in ("run", "plan"):
        first = words[1] if name == "plan" else words[words.index("--config") + 1]
        base = load_yaml(find("config", first))["checkpointer"]["checkpoint_dir"].replace("/tmp/", f"{folder}/tmp/")
        here = ["device=cpu", "dtype=fp32", "model={}", f"checkpointer.checkpoint_dir={base}"]
        moves = ["reference.every_n_steps=1"] if any(w.startswith("reference.every_n_steps=") for w in words) else []
        return here + small.get(first, SMALL) + moves
    if name == "compare" and "--runs-only" not in words:
        return [*SHORT, "--output", "answers.jsonl"]
    return SHORT if name in ("generate", "data sample", "data contrast") else []


# Stand-ins


def model(folder: Path, kind: str, **config) -> dict[str, bytes]:
    """Returns the files of a small random Llama or Mistral, or of another family by transformers; texts are bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    special = ["<s>", "</s>", "<|start|>", "<|head|>", "<|eot_id|>"]
    if kind == "gpt2":
        special = ["<|endoftext|>"]
    backend = byte_level_bpe(special)
    sizes = SIZES | {"vocab_size": backend.get_vocab_size(), "num_layers": 2, "max_seq_len": 4096}
    if kind in ("llama", "mistral"):
        save_llama(folder, sizes=sizes)
        told = json.loads((folder / "config.json").read_text())
        told |= {"bos_token_id": 0, "eos_token_id": 1, "model_type": kind, **config}
        told |= {"architectures": [f"{kind.capitalize()}ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(told))
    else:
        import hf_peers
        from transformers import AutoConfig

        hf_peers.save_peer(folder, AutoConfig.for_model(kind, vocab_size=sizes["vocab_size"], **config))
    template = {"llama": LLAMA_3, "gpt2": None, "gpt_neox": None}.get(kind, LLAMA_2)
    ends = {
        "bos_token": special[0],
        "eos_token": "<|eot_id|>" if kind == "llama" else special[min(1, len(special) - 1)],
    }
    save(folder, chat_template=template, adds_bos=False, backend=backend, **ends)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
