"""What a run tells is kept in its folder, is plain without a terminal, and never ends it."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import sys
import termios

import pytest
from helpers import ENVIRONMENT, NF4_SIZES, ROOT, random_pairs, run_config, save_llama, save_pairs

from pairtune.process import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gone(io.StringIO):
    """What a stream to a closed terminal, or to a reader that has ended, answers."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = write

    def isatty(self):
        return False


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """stdout and stderr of a kind, and what of them is kept."""

    def begin(stdout, stderr):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        console.start()
        return lambda: (tmp_path / "console.log").read_text().splitlines()[1:]

    yield begin
    console.start()  # lets go of the file


def work_through(path):
    """A line before the folder is there, bars and lines after it."""
    print("the table")
    console.keep(path)
    progress = console.Progress("step", 3, stays=True)
    for step in range(3):
        for _ in console.progress(range(2), "evaluation"):
            pass
        progress.update()
        progress.tell(f"loss {step}")
        print("a warning", file=sys.stderr)
    progress.close()
    print("the verdict")


def without_times(lines):
    return [line.rpartition(", ")[0] if line.startswith("step") else line for line in lines]


EXPECTED = ["the table"]
EXPECTED += [line for n in (1, 2, 3) for line in (f"step {n}/3: loss {n - 1}", "a warning")] + ["the verdict"]


def test_without_a_terminal_there_are_plain_lines_only_and_all_are_kept(kept, tmp_path):
    out, errors = io.StringIO(), io.StringIO()
    lines = kept(out, errors)
    work_through(tmp_path / "console.log")
    assert "\r" not in out.getvalue() + errors.getvalue() and "%" not in errors.getvalue()
    assert without_times(out.getvalue().splitlines()) == [line for line in EXPECTED if line != "a warning"]
    assert without_times(lines()) == EXPECTED


def test_on_a_terminal_the_same_lines_are_kept_without_the_bars(kept, tmp_path):
    out, errors = Terminal(), Terminal()
    lines = kept(out, errors)
    work_through(tmp_path / "console.log")
    assert "\r" in errors.getvalue() and "3/3" in errors.getvalue()  # bars
    assert without_times(lines()) == EXPECTED


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_console_that_has_gone_costs_no_line_of_the_log_and_no_run(kept, tmp_path, error):
    lines = kept(Gone(error), Gone(error))
    work_through(tmp_path / "console.log")
    sys.stdout.flush()
    assert without_times(lines()) == EXPECTED


def test_a_console_of_another_alphabet_is_no_end(kept, tmp_path):
    raw = io.BytesIO()
    lines = kept(io.TextIOWrapper(raw, encoding="ascii"), io.StringIO())
    console.keep(tmp_path / "console.log")
    print("naïve ✓")
    sys.stdout.flush()
    assert raw.getvalue() == rb"na\xefve \u2713" + b"\n" and lines() == ["naïve ✓"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_and_a_folder_in_the_place_of_the_log_are_no_end(kept, tmp_path):
    out = io.StringIO()
    kept(out, io.StringIO())
    (tmp_path / "full").symlink_to("/dev/full")
    work_through(tmp_path / "full")
    (tmp_path / "folder").mkdir()
    console.keep(tmp_path / "folder")
    print("the end")
    assert "the verdict" in out.getvalue() and "folder: cannot be written: Is a directory" in out.getvalue()
    assert out.getvalue().endswith("the end\n")


def test_what_is_told_of_a_config_is_kept_and_what_an_earlier_run_told_is_not(kept, tmp_path):
    kept(io.StringIO(), io.StringIO())
    for run, tells_config in (("a", True), ("b", False), ("c", True), ("d", False)):
        if tells_config:
            console.begin()
            print(f"config of {run}")
        console.start()
        print(f"table of {run}")
        if run != "b":  # refused before it had its folder
            console.keep(tmp_path / run)
    told = {run: (tmp_path / run).read_text().splitlines()[1:] for run in "acd"}
    assert told == {"a": ["config of a", "table of a"], "c": ["config of c", "table of c"], "d": ["table of d"]}


def test_a_long_task_tells_now_and_then_and_a_short_one_nothing(kept):
    out = io.StringIO()
    kept(out, io.StringIO())
    for _ in console.progress(range(1000), "tokenizing"):
        pass
    with console.Progress("reading weights", 4 * 10**9, in_bytes=True, every_s=0.0) as progress:
        progress.update(10**9)
        progress.update(3 * 10**9)
    assert [line.rpartition(", ")[0] for line in out.getvalue().splitlines()] == [
        "reading weights: 1.00 of 4.00 GB", "reading weights: 4.00 of 4.00 GB"
    ]  # fmt: skip


def run_on_a_terminal(folder, *words, nohup=False):
    """Starts `tune run`, closes its terminal when a step is told; returns the exit status."""
    pid, terminal = pty.fork()
    if pid == 0:  # the session's leader, which is sent SIGHUP when the terminal goes
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)  # whatever the tests run under
        command = [sys.executable, "-m", "pairtune.cli", "run", *words, "--config", str(folder / "config.yaml")]
        os.execve(sys.executable, command, ENVIRONMENT)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    seen = b""
    try:
        while b"pairs/s" not in seen:
            seen += os.read(terminal, 4096)
    except OSError:  # EIO
        pytest.fail(f"ended before a step: {seen.decode()}")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_ends_a_run_after_its_step_and_under_nohup_not_at_all(tmp_path, nohup):
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(28, seed=1))
    cfg = run_config(tmp_path, sizes=NF4_SIZES, batch_size=2, samples={"num_prompts": 0}, eval_dataset={"source": None})
    cfg |= {"epochs": 3 if nohup else 100_000, "lr_scheduler": {"warmup_ratio": 0.5}}
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    recipe = str(ROOT / "recipes" / "lora_dpo_distributed.py")
    words = ("--nproc_per_node", "2", recipe, "lr_scheduler.num_warmup_steps=2")
    status = run_on_a_terminal(tmp_path, *words, nohup=nohup)
    log = (tmp_path / "run" / "console.log").read_text()
    assert log.count("config: lr_scheduler.warmup_ratio=0.5 (") == 1  # told before there was a folder
    if nohup:
        assert status == 0 and (tmp_path / "run" / "export" / "config.json").exists()
        assert any(line.startswith(f"run folder {tmp_path / 'run'}, exported weights") for line in log.splitlines())
        return
    assert status == 129
    assert "SIGHUP: this step is finished and saved first" in log and "stopped after step" in log
    (step,) = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step == f"step_{max(logged)}"
