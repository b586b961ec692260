"""Claims about `tune`: what a name finds, how a recipe starts, what a mistake looks like."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchao
import yaml
from helpers import ROOT

from pairtune.cli import commands as cli
from pairtune.cli.check import read_words
from pairtune.cli.commands import main
from pairtune.cli.find import find, own, torchtunes
from pairtune.cli.recipe import read_recipe
from pairtune.errors import UserError

TUNE = Path(sys.executable).with_name("tune")

# Prints what a recipe sees of its start. tqdm.py beside it would break the import if it came first on sys.path.
SCRIPT = """
import json, os, sys
import beside, tqdm
from pairtune.errors import UserError
if "fail=user" in sys.argv:
    raise UserError("loss.beta=0: must be greater than 0")
if "fail=crash" in sys.argv:
    raise RuntimeError("a bug")
if "fail=interrupt" in sys.argv:
    raise KeyboardInterrupt
env = {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE")}
os.write(1, (json.dumps({"argv": sys.argv, "name": __name__, **env}) + "\\n").encode())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, and the current one, with a recipe of each kind and two configs."""
    for name in ("plain.py", "x_distributed.py", "x_single_device.py"):
        (tmp_path / name).write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "tqdm.py").write_text("raise ImportError('the current folder shadows an installed package')")
    (tmp_path / "first.yaml").write_text("a: 1\n")
    (tmp_path / "second.yml").write_text("a: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def tune(*words, cwd):
    return subprocess.run([TUNE, *words], cwd=cwd, capture_output=True, text=True, timeout=300)


def seen(result):
    assert result.returncode == 0, result.stderr
    return [yaml.safe_load(line) for line in result.stdout.splitlines() if line.startswith("{")]


def fails_with(capsys, *words):
    """Runs one command line in this process; returns its one line on stderr."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("tune: error: ") and err.count("\n") == 1
    return err


# Finding


@pytest.mark.parametrize("name", ["plain", "plain.py", "./plain", "{folder}/plain", "{folder}/plain.py"])
def test_a_recipe_is_found_by_path_with_or_without_suffix(folder, name):
    assert find("recipe", name.format(folder=folder)) == folder / "plain.py"


@pytest.mark.parametrize(
    "name, file", [("first", "first.yaml"), ("second", "second.yml"), ("second.yml", "second.yml")]
)
def test_a_config_is_found_by_path_with_or_without_suffix(folder, name, file):
    assert find("config", name) == folder / file


@pytest.mark.parametrize("kind", ["recipe", "config"])
def test_each_of_ours_is_found_from_any_folder_by_every_spelling(folder, kind):
    for name, path in own(kind).items():
        for spelling in (name, f"{name}{path.suffix}", f"{kind}s/{name}", f"{kind}s/{name}{path.suffix}"):
            assert find(kind, spelling) == path


def test_ours_are_all_files_of_the_folders_recipes_and_configs():
    root = Path(cli.__file__).parents[2]
    assert {p.name for p in own("recipe").values()} == {p.name for p in root.glob("recipes/[!_]*.py")}
    assert {p.name for p in own("config").values()} == {p.name for p in root.glob("configs/*.yaml")}


@pytest.mark.parametrize("kind", ["recipe", "config"])
def test_each_of_torchtunes_is_found_and_exists(folder, kind):
    assert len(torchtunes(kind)) == {"recipe": 19, "config": 155}[kind]  # 0.6.1's, less one that is not shipped
    for name, path in torchtunes(kind).items():
        assert path.is_file()
        assert find(kind, f"torchtune/{name}") == path
        assert find(kind, name) == own(kind).get(name, path)


def test_a_file_comes_before_a_name(folder):
    (folder / "quantize.py").write_text("")
    assert find("recipe", "quantize") == folder / "quantize.py"
    assert find("recipe", "torchtune/quantize") == torchtunes("recipe")["quantize"]


def test_an_unknown_name_is_answered_with_the_nearest(folder, capsys):
    assert "nearest: quantize" in fails_with(capsys, "run", "quantise", "--config", "first")
    assert "nearest: llama2/7B_lora" in fails_with(capsys, "cat", "llama2/7B_lor")
    assert "nearest: validate" in fails_with(capsys, "valiate", "first")


# Starting


def test_a_recipe_starts_by_path_in_one_process_with_absolute_configs_and_untouched_overrides(folder):
    words = ["--config", "first", "loss.beta=0.2=1", "--config=second.yml", "~lr_scheduler"]
    (result,) = seen(tune("run", "plain", *words, cwd=folder))
    assert result == {
        "argv": [f"{folder}/plain.py", "--config", f"{folder}/first.yaml", "--config", f"{folder}/second.yml"]
        + ["loss.beta=0.2=1", "~lr_scheduler"],
        "name": "__main__",
        "RANK": None,
        "WORLD_SIZE": None,
    }


def test_torchrun_options_before_the_recipe_start_that_many_processes(folder):
    results = seen(tune("run", "--nproc_per_node", "2", "x_distributed", "--config", "first", "a=1", cwd=folder))
    assert sorted((r["RANK"], r["WORLD_SIZE"], r["name"]) for r in results) == [
        ("0", "2", "__main__"),
        ("1", "2", "__main__"),
    ]
    for result in results:
        assert result["argv"] == [f"{folder}/x_distributed.py", "--config", f"{folder}/first.yaml", "a=1"]


def test_a_distributed_recipe_gets_a_process_for_each_gpu_and_one_without_any(folder):
    results = seen(tune("run", "x_distributed", "--config", "first", cwd=folder))
    processes = max(1, torch.cuda.device_count())
    assert sorted(r["RANK"] for r in results) == [str(rank) for rank in range(processes)]
    assert {r["WORLD_SIZE"] for r in results} == {str(processes)}


def test_under_a_torchrun_of_the_users_no_second_one_starts(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", TUNE]
    words = ["run", "x_distributed", "--config", "first"]
    results = seen(subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=300))
    assert sorted(r["RANK"] for r in results) == ["0", "1"]


def test_two_nodes_meet_at_the_address_they_are_given(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    commands = [[TUNE, "run", *node, "--node_rank", rank, "x_distributed", "--config", "first"] for rank in "01"]
    started = [subprocess.Popen(c, cwd=folder, stdout=subprocess.PIPE, text=True) for c in commands]
    results = [yaml.safe_load(process.communicate(timeout=300)[0]) for process in started]
    assert [(r["RANK"], r["WORLD_SIZE"]) for r in results] == [("0", "2"), ("1", "2")]


def test_a_torchtune_recipe_runs_to_its_end_with_components_from_the_current_folder(folder):
    (folder / "tiny.py").write_text(
        "from torchtune.models.llama2 import llama2\n"
        "def model():\n"
        "    return llama2(vocab_size=32, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=256, max_seq_len=8)\n"
        "class Checkpointer:\n"
        "    def __init__(self, **kwargs): pass\n"
        "    def load_checkpoint(self): return {'model': model().state_dict()}\n"
    )
    (folder / "tqdm.py").unlink()  # only SCRIPT imports `beside` next to it
    overrides = ["model._component_=tiny.model", "checkpointer._component_=tiny.Checkpointer", "output_dir=out"]
    result = tune("run", "quantize", "--config", "quantization", "device=cpu", "dtype=fp32", *overrides, cwd=folder)
    if hasattr(torchao.quantization, "int8_dynamic_activation_int4_weight"):
        assert result.returncode == 0, result.stderr
        assert [file.suffix for file in (folder / "out").iterdir()] == [".pt"]
    else:  # from torchao 0.16 on; all up to the call is done
        assert result.returncode == 2
        assert "int8_dynamic_activation_int4_weight: torchao 0." in result.stderr.splitlines()[-1]
    for noise in ("cpp extensions", "Failed to load", "Enum subclass"):  # torchao's and torch's lines, quieted
        assert noise not in result.stdout + result.stderr


# Mistakes


def test_a_user_error_on_every_rank_is_one_line(folder):
    result = tune("run", "--nproc_per_node", "2", "x_distributed", "--config", "first", "fail=user", cwd=folder)
    assert result.returncode == 2
    assert result.stderr.count("tune: error: loss.beta=0: must be greater than 0\n") == 1
    assert "Traceback" not in result.stderr


def test_a_bug_on_a_rank_keeps_its_traceback_and_fails_the_run(folder):
    result = tune("run", "x_distributed", "--config", "first", "fail=crash", cwd=folder)
    assert result.returncode == 1
    assert "RuntimeError: a bug" in result.stderr and "rank 0 failed" in result.stderr
    assert "ChildFailedError" not in result.stderr  # torchrun's own traceback says nothing more


def test_in_one_process_a_user_error_is_one_line_an_interrupt_130_and_a_bug_itself(folder, capsys):
    (folder / "tqdm.py").unlink()
    assert "loss.beta=0: must be" in fails_with(capsys, "run", "plain", "--config", "first", "fail=user")
    assert main(["run", "plain", "--config", "first", "fail=interrupt"]) == 130
    assert capsys.readouterr().err == "tune: interrupted\n"
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "plain", "--config", "first", "fail=crash"])


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "which recipe"),
        (["plain"], "--config CONFIG must say"),
        (["plain", "--config"], "--config CONFIG must say"),
        (["plain", "--config", "third"], "third: no such config"),
        (["plain", "--config", "first", "--lr", "1"], "--lr: after RECIPE the only option is --config"),
        (["plain", "--config", "first", "--nproc_per_node", "2"], "torchrun's options stand before RECIPE"),
        (["plain", "second.yml", "--config", "first"], "given as --config second.yml"),
        (["plain", "--config", "first", "loss.beta", "=", "1"], "with no blanks around ="),
        (["plain", "--config", "first", "loss.beta", "=1"], "with no blanks around ="),
        (["plain", "--config", "first", "\u2014lr", "1"], "a typographic dash"),
        (["quantize", "--config", "quantization", "--config", "first"], "a recipe of torchtune's takes one config"),
        (["--nproc_per_node", "2", "x_single_device", "--config", "first"], "use x_distributed"),
        (["--nproc_per_node", "2", "quantize", "--config", "quantization"], "quantize runs in one process"),
        (["--module", "x_distributed", "--config", "first"], "starts by path"),
        (["--nproc_per_node", "many", "x_distributed", "--config", "first"], "many"),
    ],
)
def test_a_wrong_command_line_says_the_way_out_before_anything_starts(folder, capsys, words, says):
    assert says in fails_with(capsys, "run", *words)


def test_a_torchtune_config_with_a_recipe_of_ours_names_torchtunes_recipe(folder, capsys):
    if "lora_dpo_single_device" not in own("recipe"):
        pytest.skip("the recipe is not there yet")
    message = fails_with(capsys, "run", "lora_dpo_single_device", "--config", "llama2/7B_lora_single_device")
    assert "such as torchtune/lora_dpo_single_device" in message
    (config,), _ = read_words(find("recipe", "lora_dpo_single_device"), ["--config", "llama2/7B_lora_dpo"])
    assert config.name == "7B_lora_dpo.yaml"  # for DPO: config.load takes over what means the same


# The other commands


def test_the_tune_of_this_environment_is_ours_and_prints_versions(tmp_path):
    line = tune("--version", cwd=tmp_path).stdout
    assert line.startswith("pairtune ") and f"torch {torch.__version__.partition('+')[0]}" in line


def test_the_help_of_a_recipe_is_its_docstring_and_its_defaults_with_their_comments(folder, capsys):
    (folder / "plain.py").write_text(
        '"""What it does.\n\nMore."""\nfrom pairtune.config import keys\nDEFAULTS = {\n    # The steps\n'
        '    "lr": 1,  # a step; distributed only\n    "loss": {"beta": 0.5},  # a block\n    # Shared\n'
        '    **keys.DISTRIBUTED,  # distributed only\n    "dataset": {**keys.ROWS, "more": None},\n}\nraise OSError'
    )
    assert main(["run", "plain", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does.\n\nMore.\n") and max(map(len, out.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in out.splitlines()]
    steps = lines.index("The steps")
    assert lines[steps + 1 : steps + 4] == ["lr: 1 a step", "loss: a block", "beta: 0.5"]
    assert lines[lines.index("Shared") + 1].startswith("data_parallel_replicate_dim: 1 copies of the model")
    assert "split: train slices work: train[:90%]" in lines and lines[-1] == "more: null"


@pytest.mark.parametrize("name", own("recipe"))
def test_the_help_of_a_recipe_of_ours_tells_every_key_once(name, capsys):
    assert main(["run", name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for key in read_recipe(name)[1]:
        assert len([line for line in lines if line.startswith(f"  {key}:")]) == 1, key


def test_ls_shows_every_name_that_run_takes_with_a_line_about_each_of_ours(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = {word for line in lines for word in line.split()}
    for kind in ("recipe", "config"):
        for name in torchtunes(kind):
            assert name in words or f"torchtune/{name}" in words
        for name in own(kind):
            (line,) = [line for line in lines if line.startswith(f"{name} ")]
            assert len(line.split()) > 2, f"{name} has no description"


def test_cp_adds_the_suffix_and_says_whether_it_replaced(folder, capsys):
    assert main(["cp", "quantize", "mine"]) == 0
    assert capsys.readouterr().out == "Copied to mine.py\n"
    assert (folder / "mine.py").read_bytes() == torchtunes("recipe")["quantize"].read_bytes()
    (folder / "mine.py").write_text("edited")
    assert main(["cp", "quantize", "mine.py", "-n"]) == 0
    assert (folder / "mine.py").read_text() == "edited"
    assert main(["cp", "quantize", "mine.py"]) == 0
    assert capsys.readouterr().out == "Kept mine.py, which exists\nReplaced mine.py\n"
    assert (folder / "mine.py").read_text() != "edited"


def test_cp_into_a_folder_keeps_the_name_and_makes_folders_only_when_told(folder, capsys):
    assert main(["cp", "llama2/7B_lora", "."]) == 0
    assert (folder / "7B_lora.yaml").is_file()
    assert "--make-parents" in fails_with(capsys, "cp", "llama2/7B_lora", "new/my.v2")
    assert main(["cp", "llama2/7B_lora", "new/my.v2", "--make-parents"]) == 0
    assert (folder / "new/my.v2.yaml").is_file()


def test_cp_copies_what_came_with_the_package_not_a_file_of_that_name(folder):
    (folder / "quantize.py").write_text("edited")
    assert main(["cp", "quantize", "fresh.py"]) == 0
    assert (folder / "fresh.py").read_text() != "edited"


def test_cp_never_writes_a_file_over_itself(folder, capsys):
    source = torchtunes("recipe")["quantize"]
    before = source.read_bytes()
    assert "cannot be written" in fails_with(capsys, "cp", "quantize", str(source))
    assert source.read_bytes() == before


def test_a_copy_of_a_recipe_of_ours_starts_in_another_folder(folder):
    for name in own("recipe"):
        assert main(["cp", f"recipes/{name}", "my_recipe.py"]) == 0
        assert find("recipe", "my_recipe.py") == folder / "my_recipe.py"
        result = tune("run", "my_recipe.py", "--config", "first.yaml", cwd=folder)
        assert result.returncode == 2 and "unknown key a" in result.stderr, result.stderr  # it read first.yaml
        break  # they start alike; one costs 5 s


def test_cat_prints_the_file_and_sorts_keys_when_told(folder, capsys):
    path = torchtunes("config")["llama2/7B_lora"]
    assert main(["cat", "llama2/7B_lora"]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(["cat", "llama2/7B_lora", "--sort"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(path.read_text()) and list(printed) == sorted(printed)
    assert main(["cat", "plain"]) == 0
    assert capsys.readouterr().out == SCRIPT
    assert "is a recipe" in fails_with(capsys, "cat", "plain", "--sort")


def test_validate_checks_a_config_with_overrides_against_a_recipe(folder, capsys):
    (folder / "r.py").write_text("METHOD = 'full'\nDEFAULTS = {'epochs': 1}\nassert __name__ != '__main__'\n")
    (folder / "good.yaml").write_text("epochs: 2\n")
    assert main(["validate", "good", "--recipe", "r", "epochs=3"]) == 0
    assert capsys.readouterr().out.startswith("r: ok\n")
    assert main(["validate", "good", "epochs=0", "--recipe", "r"]) == 1
    assert "refused: epochs=0: must be above 0" in capsys.readouterr().out
    assert "sets no METHOD" in fails_with(capsys, "validate", "good", "--recipe", "beside")


def test_validate_lays_one_config_on_another(folder, capsys):
    (folder / "r.py").write_text("METHOD = 'full'\nDEFAULTS = {'epochs': 1}\n")
    (folder / "below.yaml").write_text("epochs: 2\n")
    (folder / "above.yaml").write_text("epochs: 0\n")
    assert main(["validate", "below", "--recipe", "r", "--config", "above"]) == 1
    assert "refused: epochs=0" in capsys.readouterr().out
    assert main(["validate", "above", "--config", "below", "--recipe", "r"]) == 0


def test_validate_asks_torchtune_about_torchtunes_configs(folder, capsys):
    assert main(["validate", "llama2/7B_lora"]) == 0
    assert "takes one config" in fails_with(capsys, "validate", "llama2/7B_lora", "--config", "llama2/7B_lora")
    assert main(["validate", "llama2/7B_lora_dpo", "--recipe", "lora_dpo_distributed"]) == 1
    assert "dataset._component_" in capsys.readouterr().out
    (folder / "bad.yaml").write_text("model:\n  _component_: torchtune.models.llama2.llama2_7b\n  no_such: 1\n")
    assert main(["validate", "bad", "--torchtune"]) == 1
    assert "no_such" in capsys.readouterr().out


def test_kaggle_downloads_go_to_torchtune(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["download", "not-a-handle", "--source", "kaggle"])
    assert end.value.code == 2
    assert "Invalid model handle" in capsys.readouterr().err  # kagglehub's words, before any request


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate base --promt hello", "--promt: tune generate has no such option; nearest: --prompt"),
        ("generate --promt", "--promt: tune generate has no such option; nearest: --prompt"),
        ("compare a b --jugde=x", "--jugde: tune compare has no such option; nearest: --judge"),
        ("chat base --dtype fp32", "--dtype: a key is set without dashes, as key=value; set dtype=fp32"),
        (
            "generate base --learning_rate=1",
            "a key is set without dashes, as key=value; here it is called optimizer.lr",
        ),
        ("plot --outputs x", "--outputs: tune plot has no such option; nearest: --output"),
        ("report x --zzz", "--zzz: tune report has no such option; it has --output"),
        ("ls --all", "--all: tune ls has no such option; it has none"),
        ("ls here", "tune ls: here: more than it takes; tune ls --help tells more"),
        ("generate", "tune generate: FOLDER is missing; tune generate --help"),
        ("generate base --batch-size x", "tune generate: --batch-size x: must be a whole number"),
        ("generate base --prompt", "tune generate: --prompt: needs one value"),
        ("cache lss", "tune cache: action lss: must be ls or rm; nearest: ls"),
        ("cp -k a b", "-k: tune cp has no such option"),
        (
            "run --nproc_per_nodes 2 lora_dpo_distributed",
            "--nproc_per_nodes: tune run has no such option; nearest: --nproc",
        ),
        ("sweep --nproc_per_nodes 2 lora_dpo_distributed", "--nproc_per_nodes: tune sweep has no such option; nearest"),
    ],
)
def test_a_mistyped_word_is_told_in_a_sentence_with_the_nearest_option(capsys, words, said):
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert said in error and error.startswith("tune: error: ") and error.count("\n") == 1 and "usage" not in out + error


def test_every_mistake_is_a_value_error_in_python(folder):
    with pytest.raises(UserError, match="no such recipe"):
        cli.run(["nothing", "--config", "first"])


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ("ls", ""), ("ls", "1"), ("--help", ""), ("--help", "1"), ("--version", ""), ("validate --help", ""),
        ("cat llama3_8b", ""), ("cat --sort llama3_8b", "1"), ("cache ls --cache-dir {folder}", ""),
        ("run lora_dpo_single_device --help", ""), ("run lora_dpo_single_device --help", "1"),
    ],
)  # fmt: skip
def test_a_reader_that_has_read_enough_is_no_error(tmp_path, words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)  # as `| true` does, and `| head` behind its lines
    try:
        command = [sys.executable, "-m", "pairtune.cli", *words.format(folder=tmp_path).split()]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=300)
    finally:
        os.close(writing)
    assert ended.stderr == b""
    assert ended.returncode == (0 if words.startswith("run") else 128 + signal.SIGPIPE)  # a run goes on unheard
