"""Ways to misuse a run folder, as a table: nothing of a user's or of a run's is lost, and each refusal is one sentence.

A row makes files and says what a run there does: it is refused, and every file is where and what it was; or it works,
and the same is true but for what is said to be moved. Most rows take the steps that a recipe takes, without the rest of
it. Read-only and full disks are mounted, which takes root: they are skipped without. Whole runs are at the end.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import yaml
from helpers import ENVIRONMENT, random_pairs, run_config, run_recipe, save_llama, save_pairs

from pairtune import config
from pairtune.cli.check import _check_run_dir
from pairtune.errors import UserError
from pairtune.run import resuming
from pairtune.run.folder import claim
from pairtune.run.places import LOCK, MARK

COMMAND = "# tune run lora_dpo_single_device --config run/config.yaml\n"


def run_in(folder: Path, *without: str, config_text: str = "") -> Path:
    """Makes what a run has left in a folder."""
    files = {
        "config.yaml": COMMAND + config_text,
        "metrics.jsonl": '{"step": 1, "loss": 0.7}\n',
        "samples.jsonl": "{}\n",
        "curves.png": "png",
        "checkpoints/step_1/COMPLETE": '{"state.json": 2}',
        "checkpoints/step_1/state.json": "{}",
        "export/model.safetensors": "weights",
        "export/adapter/adapter_model.safetensors": "matrices",
    }
    for name, text in files.items():
        if not name.startswith(without):
            write(folder / name, text)
    return folder


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def link(path: Path, to: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every name in a folder, with its kind, mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        content = os.readlink(path) if kind == "link" else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = kind, content, path.lstat().st_mode, path.lstat().st_ino
    return found


def without_lock(found: dict[str, tuple]) -> dict[str, tuple]:
    return {name: entry for name, entry in found.items() if not name.endswith(LOCK)}


def start(run_dir: Path, cfg: dict | None = None):
    """What a recipe does with its run folder before it trains; returns its hold on it."""
    cfg = {"output_dir": str(run_dir), "resume": False, **(cfg or {})}
    held = claim(run_dir, config.paths(cfg))
    resumed = held.check(resuming.find(cfg["resume"], run_dir))
    held.make_room(resumed)
    config.save(cfg, run_dir / "config.yaml", "lora_dpo_single_device")
    return held


# What is refused: name, what makes it and returns the folder and the config, words of the sentence

REFUSED = []


def refused(*says: str, early: bool = True):
    """Adds a row. `early`: `tune run` says the same before torch is imported."""

    def add(make):
        REFUSED.append(pytest.param(make, says, early, id=make.__name__.replace("_", " ")))
        return make

    return add


def adds(name: str, says: list[str], make, early: bool = True):
    make.__name__ = name
    refused(*says, early=early)(make)


@refused("is a file", "name another output_dir")
def a_file(t):
    return write(t / "run"), {}


@refused("cannot be a folder", "Not a directory")
def a_path_through_a_file(t):
    write(t / "file")
    return t / "file" / "run", {}


@refused("cannot be a folder", "name too long")
def a_name_too_long(t):
    return t / ("x" * 300), {}


@refused("holds a character")
def a_NUL_character(t):
    return t / "a\0b", {}


@refused("holds a character")
def a_line_break(t):
    return t / "a\nb", {}


@refused("holds a character")
def half_a_surrogate_pair(t):
    return t / "a\udc80", {}


@refused("is a file")
def a_device(t):
    return Path("/dev/null"), {}


@refused("is a file")
def a_pipe(t):
    os.mkfifo(t / "pipe")
    return t / "pipe", {}


@refused("is the folder that the command runs in", "output_dir=runs/dpo")
def the_current_folder(t):
    return Path("."), {}


@refused("is the folder that the command runs in")
def the_current_folder_by_its_path(t):
    return t / "here", {}


@refused("holds the folder that the command runs in")
def the_folder_above(t):
    return Path(".."), {}


@refused("holds the folder that the command runs in")
def the_root(t):
    return Path("/"), {}


@refused("is the folder that the command runs in")
def a_link_to_the_current_folder(t):
    return link(t / "link", t / "here"), {}


@refused("is your home folder")
def home(t):
    return Path.home(), {}


@refused("is your home folder")
def a_link_to_home(t):
    return link(t / "link", Path.home()), {}


@refused("is a symbolic link to", "which is not there", "make that folder, or name another output_dir")
def a_link_to_nothing(t):
    return link(t / "run", t / "gone"), {}


@refused("is a symbolic link to", "which is not there")
def a_path_through_a_link_to_nothing(t):
    link(t / "disk", t / "gone")
    return t / "disk" / "run", {}


@refused("cannot be a folder", "Too many levels of symbolic links")
def a_link_to_itself(t):
    return link(t / "run", "run"), {}


@refused("is a file")
def a_link_to_a_file(t):
    return link(t / "run", write(t / "file")), {}


@refused("holds checkpoints", "not the folder of a run", "name another output_dir")
def a_project_with_checkpoints(t):
    write(t / "run/checkpoints/w.bin")
    write(t / "run/notes.txt")
    return t / "run", {}


for entry in ("config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png", "export/model.bin", "checkpoints/a.pt"):
    adds(f"a users {entry}", [f"holds {entry.partition('/')[0]}", "not the folder of a run"],
         lambda t, entry=entry: (write(t / "run" / entry).parents[entry.count("/")], {}))  # fmt: skip


@refused("holds config.yaml, metrics.jsonl")
def another_tools_config_and_log(t):
    write(t / "run/config.yaml", "lr: 1\n")
    write(t / "run/metrics.jsonl", '{"step": 1, "loss": 0.7}\n')
    return t / "run", {}


@refused("holds config.yaml, metrics.jsonl")
def our_config_beside_another_tools_log(t):
    write(t / "run/config.yaml", COMMAND)
    write(t / "run/metrics.jsonl", "epoch,loss\n")
    return t / "run", {}


@refused("holds checkpoints, config.yaml")
def our_config_beside_others_checkpoints(t):
    write(t / "run/config.yaml", COMMAND)
    write(t / "run/checkpoints/step_1/pytorch_model.bin")
    return t / "run", {}


@refused("holds checkpoints")
def a_link_called_checkpoints(t):
    link(t / "run/checkpoints", t / "here")
    return t / "run", {}


@refused("holds config.yaml")
def a_config_of_ours_that_was_put_there_by_hand(t):
    write(t / "run/config.yaml", COMMAND)
    return t / "run", {}


for entry in ("notes.txt", "pairs.jsonl", "plots/a.png", ".env", "train.log"):
    adds(f"a run with a users {entry}", ["holds an earlier run and also", entry.partition("/")[0], "resume=true"],
         lambda t, entry=entry: (write(run_in(t / "run") / entry).parents[entry.count("/")], {}))  # fmt: skip


@refused("holds an earlier run and also logs")
def a_run_with_logs_that_its_logger_has_not_written(t):
    run_in(t / "run", config_text="metric_logger:\n  _component_: a.B\n  log_dir: elsewhere\n")
    write(t / "run/logs/mine.txt")
    return t / "run", {}


@refused("lies in", "which is a run's own")
def a_folder_in_a_runs_export(t):
    return run_in(t / "run") / "export" / "again", {}


@refused("lies in", "which is a run's own")
def a_checkpoint(t):
    return run_in(t / "run") / "checkpoints" / "step_1", {}


# Inputs in the folder that would be moved: the config's key, its value as a path below the test's folder

INSIDE = {
    "checkpointer.checkpoint_dir": "run/export",
    "adapter": "run/export/adapter",
    "reference.checkpoint_dir": "run/export",
    "reference.cache_dir": "run/checkpoints",
    "dataset.source": "run/samples.jsonl",
    "eval_dataset.source": "run/samples.jsonl",
    "tokenizer.path": "run/export",
    "tokenizer.chat_template": "run/samples.jsonl",
    "resume": "run/checkpoints/step_1",
    "loss.table": "run/samples.jsonl",
}


def nested(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


for key, place in INSIDE.items():
    if key != "resume":
        adds(f"{key} in the folder", [f"{key}=", "lies in output_dir=", "be moved aside, ", "name another output"],
             lambda t, key=key, place=place: (run_in(t / "run"), nested(key, str(t / place))))  # fmt: skip


@refused("dataset.source=", "lies in output_dir=")
def a_source_in_a_list(t):
    return run_in(t / "run"), {"dataset": {"source": [str(write(t / "a.jsonl")), str(t / "run/samples.jsonl")]}}


@refused("checkpointer.checkpoint_files", "lies in output_dir=")
def a_file_of_the_checkpointer(t):
    run_in(t / "run")
    write(t / "base/config.json")
    return t / "run", {"checkpointer": {"checkpoint_dir": str(t / "base"), "checkpoint_files": ["../run/curves.png"]}}


@refused("adapter=", "leads to", "lies in output_dir=")
def an_adapter_by_a_link(t):
    run_in(t / "run")
    return t / "run", {"adapter": str(link(t / "best", t / "run/export/adapter"))}


@refused("adapter=", "leads to")
def an_adapter_by_a_link_to_a_link(t):
    run_in(t / "run")
    link(t / "best", t / "run/export")
    return t / "run", {"adapter": str(link(t / "mine", t / "best/adapter"))}


@refused("checkpointer.checkpoint_dir=", "leads to")
def a_snapshot_of_links_into_the_folder(t):
    run_in(t / "run")
    link(t / "snapshot/model.safetensors", "../run/export/model.safetensors")
    return t / "run", {"checkpointer": {"checkpoint_dir": str(t / "snapshot")}}


@refused("dataset.source=", "leads to")
def a_link_deep_in_a_folder_of_rows(t):
    run_in(t / "run")
    link(t / "rows/a/b/c.jsonl", t / "run/samples.jsonl")
    return t / "run", {"dataset": {"source": str(t / "rows")}}


@refused("adapter=", "lies in output_dir=")
def an_adapter_while_the_folder_is_named_by_a_link(t):
    run_in(t / "run")
    return link(t / "latest", t / "run"), {"adapter": str(t / "run/export/adapter")}


@refused("adapter=", "lies in output_dir=")
def an_adapter_while_the_folder_is_named_by_dots(t):
    run_in(t / "run")
    return t / "here" / ".." / "run", {"adapter": str(t / "run/export/adapter")}


@refused("is output_dir, too")
def the_models_folder(t):
    write(t / "base/config.json")
    return t / "base", {"checkpointer": {"checkpoint_dir": str(t / "base")}}


@refused("is output_dir, too")
def the_models_folder_by_a_link(t):
    write(t / "base/config.json")
    return link(t / "run", t / "base"), {"checkpointer": {"checkpoint_dir": str(t / "base")}}


@refused("is output_dir, too")
def the_adapters_folder(t):
    write(t / "sft/adapter_config.json")
    return t / "sft", {"adapter": str(t / "sft")}


@refused("is output_dir, too")
def the_caches_folder(t):
    write(t / "cache/weights.json")
    return t / "cache", {"reference": {"cache_dir": str(t / "cache")}}


@refused("lies in dataset.source=", "all of whose files are read")
def the_folder_of_rows(t):
    write(t / "rows/a.jsonl")
    return t / "rows", {"dataset": {"source": str(t / "rows")}}


@refused("lies in eval_dataset.source=")
def a_folder_below_that_of_rows(t):
    write(t / "rows/a.jsonl")
    return t / "rows" / "runs" / "one", {"eval_dataset": {"source": str(t / "rows")}}


@refused("lies in dataset.source=")
def a_folder_below_that_of_rows_by_a_link(t):
    write(t / "rows/a.jsonl")
    return t / "rows" / "one", {"dataset": {"source": str(link(t / "data", t / "rows"))}}


@refused("holds samples.jsonl")
def rows_with_a_runs_name(t):
    return t / "run", {"dataset": {"source": str(write(t / "run/samples.jsonl"))}}


@refused("resume=true", "holds no complete one", early=False)
def resuming_what_has_no_checkpoint(t):
    return run_in(t / "run", "checkpoints"), {"resume": True}


@refused("config.yaml there is not what a run has written", early=False)
def resuming_beside_a_users_config(t):
    write(run_in(t / "run") / "config.yaml", "lr: 1\n")
    return t / "run", {"resume": True}


@refused("export/ there is written anew, and holds model.gguf", "put it elsewhere", early=False)
def resuming_beside_a_users_file_in_the_export(t):
    write(run_in(t / "run") / "export/model.gguf")
    return t / "run", {"resume": True}


@refused("adapter=", "lies in what this run writes", early=False)
def resuming_with_an_adapter_of_the_export(t):
    run_in(t / "run")
    return t / "run", {"resume": True, "adapter": str(t / "run/export/adapter")}


@refused("is not a complete checkpoint", early=False)
def resuming_from_half_a_checkpoint_of_another_run(t):
    write(t / "other/checkpoints/step_1/state.json", "{}")
    return run_in(t / "run"), {"resume": str(t / "other/checkpoints/step_1")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the command runs in `here`, and `home` is home."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("make, says, early", REFUSED)
def test_a_misuse_is_refused_in_a_sentence_and_touches_nothing(place, make, says, early):
    run_dir, cfg = make(place)
    before = snapshot(place)
    for attempt in (start, at_the_command)[: 1 + early]:
        message = refusal(attempt, run_dir, cfg)
        assert not [word for word in says if word not in message], message
        assert "\n" not in message and ". " not in message.replace(str(place), "")
        assert snapshot(place) == before


def refusal(attempt, *arguments) -> str:
    """What an attempt is refused with; the claim that it had is let go of with the error."""
    try:
        attempt(*arguments)
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def at_the_command(run_dir, cfg):
    _check_run_dir({"output_dir": str(run_dir), "resume": False, **cfg}, [])


def test_there_are_as_many_rows_as_were_asked_for():
    assert len(REFUSED) + len(WORKS) >= 60


# What works: the folder, the config, and where what was in it is afterwards

WORKS = []


def works(moved: dict[str, str] | None = None):
    def add(make):
        WORKS.append(pytest.param(make, moved or {}, id=make.__name__.replace("_", " ")))
        return make

    return add


@works()
def a_new_folder(t):
    return t / "run", {}


@works()
def a_new_folder_in_new_folders(t):
    return t / "a/b/run", {}


@works()
def an_empty_folder(t):
    (t / "run").mkdir()
    return t / "run", {}


@works()
def a_name_of_spaces_and_letters(t):
    return t / "mein lauf é 数", {}


@works()
def a_link_to_an_empty_folder(t):
    (t / "disk").mkdir()
    return link(t / "run", t / "disk"), {}


@works()
def a_folder_with_things_of_a_user(t):
    write(t / "run/notes.txt")
    write(t / "run/data/pairs.jsonl")
    return t / "run", {"dataset": {"source": str(t / "run/data/pairs.jsonl")}}


@works()
def what_a_kill_has_left_of_a_start(t):
    return write(t / "run" / LOCK, "").parent, {}


@works()
def a_word_of_the_config_that_is_also_the_folders_name(t):
    (t / "here/train").mkdir()
    return Path("train"), {"dataset": {"split": "train", "source": "org/train"}}


@works({"run": "run.1"})
def an_earlier_run(t):
    return run_in(t / "run"), {}


@works({"run": "run.1"})
def an_earlier_run_without_checkpoints(t):
    return run_in(t / "run", "checkpoints", "export"), {}


@works({"run": "run.1"})
def an_earlier_run_without_a_log(t):
    return run_in(t / "run", "metrics.jsonl"), {}


@works({"run": "run.3"})
def names_that_are_taken(t):
    write(t / "run.1")
    link(t / "run.2", "nowhere")
    return run_in(t / "run"), {}


@works({"run": "run.1"})
def what_a_kill_has_left_before_the_first_step(t):
    write(t / "run" / LOCK, MARK.decode())
    write(t / "run/metrics.jsonl", '{"step": 1}\n')
    return t / "run", {}


@works({"run": "run.1"})
def an_earlier_run_with_what_its_logger_wrote(t):
    logs = t / "run" / "logs"
    run_in(t / "run", config_text=f"metric_logger:\n  _component_: a.B\n  log_dir: {logs}\n")
    write(logs / "events")
    write(t / "run/wandb/a")
    write(t / "run/.DS_Store")
    return t / "run", {}


@works({"disk/run": "disk/run.1"})
def an_earlier_run_by_a_link(t):
    run_in(t / "disk/run")
    return link(t / "run", t / "disk/run"), {}


@works({"disk/run": "disk/run.1"})
def an_earlier_run_by_a_link_that_is_relative(t):
    run_in(t / "disk/run")
    return link(t / "run", "disk/run"), {"checkpointer": {"checkpoint_dir": str(write(t / "base/a").parent)}}


@works({"disk/run": "disk/run.1"})
def an_earlier_run_in_a_folder_that_is_a_link(t):
    run_in(t / "disk/run")
    link(t / "runs", t / "disk")
    return t / "runs" / "run", {}


@works({"run": "run.1"})
def a_file_that_is_also_in_the_folder_by_another_name(t):
    run_in(t / "run")
    (t / "rows.jsonl").hardlink_to(t / "run/samples.jsonl")
    return t / "run", {"dataset": {"source": str(t / "rows.jsonl")}}


@pytest.mark.parametrize("make, moved", WORKS)
def test_what_works_keeps_every_file_there_was(place, make, moved, capsys):
    run_dir, cfg = make(place)
    before = without_lock(snapshot(place))
    start(run_dir, cfg)
    after = snapshot(place)
    for name, entry in before.items():
        old = next((part for part in moved if name == part or name.startswith(f"{part}/")), None)
        there = after[moved[old] + name.removeprefix(old) if old else name]
        assert there[:3] == entry[:3] and (entry[0] != "file" or there[3] == entry[3])
    assert (run_dir / "config.yaml").read_text().startswith("# tune run")
    assert (run_dir / LOCK).read_bytes() == MARK
    assert ("is now" in capsys.readouterr().out) == bool(moved)


def test_a_saved_config_repeats_its_run_and_is_kept_with_it(place):
    """The command on its first line: it has been read when its folder is moved."""
    run_dir = run_in(place / "run")
    cfg = {"output_dir": str(run_dir), "resume": False}
    _check_run_dir(cfg, [run_dir / "config.yaml"])
    start(run_dir)
    assert (place / "run.1/config.yaml").read_text() == COMMAND
    write(place / "run/export/mine.yaml")
    with pytest.raises(UserError, match="^--config=.*mine.yaml: lies in output_dir="):
        _check_run_dir(cfg, [run_dir / "config.yaml", run_dir / "export/mine.yaml"])


def test_a_folder_that_was_made_for_a_refused_run_goes_and_one_that_was_there_stays(place):
    (place / "there").mkdir()
    for path in (place / "a/b/run", place / "there"):
        before = snapshot(place)
        held = claim(path)
        assert (path / LOCK).exists()
        del held
        assert snapshot(place) == before


def test_another_run_is_refused_by_whatever_path_it_comes(place):
    link(place / "link", place / "run")
    ours, theirs = multiprocessing.Pipe()
    child = fork(lambda: (held := claim(place / "run"), theirs.send("has it"), theirs.recv(), held))
    assert ours.recv() == "has it"
    before = snapshot(place)
    for path in (place / "run", place / "link", Path("../run"), place / "here/../run"):
        for attempt in (claim, lambda path: at_the_command(path, {})):
            assert "another run is writing there; wait until it has ended, or name" in refusal(attempt, path)
    assert snapshot(place) == before
    os.kill(child, signal.SIGKILL)  # a run that is killed does not block the next one
    os.waitpid(child, 0)
    start(place / "run")


def test_of_runs_that_start_at_once_one_has_the_folder(place):
    for _ in range(20):
        run_dir = run_in(place / "run")
        before = {name: entry for name, entry in snapshot(place).items() if name.startswith("run/")}
        context = multiprocessing.get_context("fork")
        barrier, results = context.Barrier(4), context.SimpleQueue()

        def attempt(barrier=barrier, results=results, run_dir=run_dir):
            barrier.wait()
            held = None
            with contextlib.suppress(UserError), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                held = start(run_dir)
            results.put(held is not None)
            barrier.wait()  # who has it keeps it until all have tried

        children = [fork(attempt) for _ in range(4)]
        assert sorted(results.get() for _ in children) == [False, False, False, True]
        for child in children:
            os.waitpid(child, 0)
        after = snapshot(place)
        for name, entry in before.items():
            assert after[name.replace("run/", "run.1/")][:2] == entry[:2]
        assert not (place / "run.2").exists()
        shutil.rmtree(place / "run")
        shutil.rmtree(place / "run.1")


def fork(doing) -> int:
    """Starts a process that does something and ends without more."""
    child = os.fork()
    if child:
        return child
    try:
        doing()
    finally:
        os._exit(0)


@pytest.mark.parametrize("kind", ["a run", "a run by a link", "nothing", "a run that was killed at its export"])
def test_killed_at_any_moment_nothing_is_lost_and_the_next_run_works(place, kind):
    for moment in count():
        real = place / ("disk/run" if kind == "a run by a link" else "run")
        if kind != "nothing":
            run_in(real)
        if kind == "a run by a link":
            link(place / "run", real)
        if kind == "a run that was killed at its export":  # between its two renames
            (real / "export").rename(write(real / ".export-abc/export/model.safetensors").parent.parent / "earlier")
        earlier = {p.name: p.read_bytes() for p in real.rglob("*") if p.is_file() and ".export" not in str(p)}
        left = fork_and_kill(place / "run", moment)
        for again in (False, True):
            if again:
                start(place / "run")
            there = [path for path in place.rglob("*") if path.is_file()]
            for name, content in earlier.items():
                assert any(path.name == name and path.read_bytes() == content for path in there), (moment, name)
        assert (place / "run/config.yaml").exists() and (place / "run").is_symlink() == (kind == "a run by a link")
        if kind == "a run that was killed at its export":
            assert any(place.glob("run*/export/model.safetensors"))
        for path in [*place.glob("run*"), *place.glob("disk")]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        if not left:
            break
    assert moment > 5


def fork_and_kill(run_dir: Path, moment: int) -> bool:
    """Starts a run in a process that is killed at its n-th call of the system; whether there were so many."""

    def begin():
        calls = count()

        def kill(event, arguments):
            if event.split(".")[0] in ("os", "open", "fcntl", "shutil", "pathlib") and next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            start(run_dir)

    return os.WIFSIGNALED(os.waitpid(fork(begin), 0)[1])


# Disks


@pytest.fixture
def mount(place):
    """Mounts a disk of a size on a folder; skips where that is not allowed."""
    mounted = []

    def mount(folder: Path, *options: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk of its own takes root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # console.log may be open


def test_a_read_only_disk_is_told(mount, place):
    disk = mount(place / "disk", "size=1m")
    run_in(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = snapshot(disk)
    for path in (disk / "new", disk / "run", disk / "run" / "sub"):
        for attempt in (start, at_the_command):
            message = refusal(attempt, path, {})
            assert re.fullmatch(r"output_dir=.*Read-only file system; name another output_dir.*", message)
    assert snapshot(disk) == before


def test_a_disks_own_folder_is_used_and_not_moved(mount, place):
    disk = mount(place / "disk", "size=1m")
    start(disk)
    run_in(disk)
    before = snapshot(disk)
    for attempt in (start, at_the_command):
        message = refusal(attempt, disk, {})
        assert re.search("a mount point.*; name another output_dir, such as .*disk/run, or go on", message)
    assert snapshot(disk) == before


# Whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_llama(folder / "base")
    save_pairs(folder / "train.jsonl", random_pairs(24, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(6, seed=2))
    cfg = run_config(folder, samples={"num_prompts": 1, "max_new_tokens": 3}, optimizer={"lr": 1e-3}, keep_best="loss")
    write(folder / "config.yaml", json.dumps(cfg | {"eval_every_n_steps": 1, "save_every_n_steps": 1}))
    return folder


class Filler:
    """A logger that leaves so many bytes on a disk when the last step has been logged and saved."""

    def __init__(self, log_dir: str, leaves: int):
        self._path, self._leaves = Path(log_dir) / "filler", leaves

    def log_config(self, cfg):
        pass

    def log_dict(self, metrics, step):
        pass

    def close(self):
        free = shutil.disk_usage(self._path.parent).free
        self._path.write_bytes(bytes(max(0, free - self._leaves)))


def result(run_dir: Path) -> dict:
    """What a run ends with, but for how fast it was, and for what names its folder."""
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speed = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
    exported = [p for p in (run_dir / "export").rglob("*") if p.is_file() and p.name != "README.md"]
    files = {p.relative_to(run_dir): p.read_bytes() for p in exported}
    samples = (run_dir / "samples.jsonl").read_text()
    return {"log": [{k: v for k, v in row.items() if k not in speed} for row in log], "samples": samples, **files}


def run(inputs, run_dir, *overrides, recipe="lora_dpo_single_device"):
    run_recipe(recipe, f"output_dir={run_dir}", *overrides, config_paths=[inputs / "config.yaml"])


def test_everything_has_the_modes_that_the_umask_gives(place, inputs):
    before = os.umask(0o027)
    try:
        cached = ("reference=cached", f"reference.cache_dir={place}/cache")
        run(inputs, place / "run", *cached)
        run(inputs, place / "full", recipe="full_dpo_single_device")
    finally:
        os.umask(before)
    made = [path for folder in ("run", "full", "cache") for path in [place / folder, *(place / folder).rglob("*")]]
    assert len(made) > 20
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in made}
    wrong = {p.name for p in made if modes[p.name] != ("0o750" if p.is_dir() else "0o640")}
    assert not wrong, {name: modes[name] for name in wrong}


@pytest.mark.parametrize("leaves", [0, 2**17])
@pytest.mark.parametrize("best", [False, True])
def test_an_export_that_finds_the_disk_full_is_made_by_resuming_without_training(place, inputs, mount, leaves, best):
    export_best = f"export_best={str(best).lower()}"
    run(inputs, place / "undisturbed", export_best)
    disk = mount(place / "disk", "size=40m")
    filler = f"metric_logger={{_component_: test_output_dir.Filler, log_dir: {disk}, leaves: {leaves}}}"
    message = refusal(run, inputs, disk / "run", export_best, filler)
    assert re.fullmatch(r"after the last step: .*the disk is full.*resume=true goes on from .*step_3, .*again", message)
    assert not [path for path in (disk / "run").glob(".*") if path.name != LOCK]
    assert not (disk / "run" / "export").exists()
    (disk / "filler").unlink()
    before = (disk / "run/metrics.jsonl").read_bytes()
    run(inputs, disk / "run", export_best, "resume=true")
    assert (disk / "run/metrics.jsonl").read_bytes() == before  # nothing was trained again
    assert result(disk / "run") == result(place / "undisturbed")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95, 1.3])
def test_a_disk_without_room_is_told_before_the_first_step(place, inputs, mount, share):
    run(inputs, place / "undisturbed")
    took = sum(path.stat().st_size for path in (place / "undisturbed").rglob("*") if path.is_file())
    disk = mount(place / "disk", f"size={int(share * took)}")
    if share > 1:
        run(inputs, disk / "run")
        assert result(disk / "run") == result(place / "undisturbed")
        return
    message = refusal(run, inputs, disk / "run")
    assert "\n" not in message and re.search("less than the run takes|cannot be written: No space left", message)
    assert not list((disk / "run").glob("checkpoints/step_*")) and not (disk / "run/metrics.jsonl").exists()


def test_of_two_commands_that_start_at_once_one_trains(place, inputs):
    run_in(place / "run")
    command = [sys.executable, "-m", "pairtune.cli", "run", "lora_dpo_single_device", "--config"]
    command += [str(inputs / "config.yaml"), f"output_dir={place / 'run'}"]
    options = {"env": ENVIRONMENT, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    runs = [subprocess.Popen([*command, f"seed={seed}"], **options) for seed in (1, 2)]
    said = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    won = 1 + [run.returncode for run in runs].index(0)
    assert "another run is writing there" in said[2 - won] and "Traceback" not in "".join(said)
    assert yaml.safe_load((place / "run/config.yaml").read_text())["seed"] == won
    assert (place / "run.1/export/model.safetensors").read_text() == "weights"
    assert not (place / "run.2").exists()
