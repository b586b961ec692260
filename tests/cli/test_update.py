"""A copy of a recipe knows what it was copied from: its changes are shown, and carried onto a newer recipe."""

import os
import shutil
import subprocess
import sys

import pytest

from pairtune.cli import find
from pairtune.cli.commands import main

NAME = "lora_dpo_single_device"
EDITS = (  # a user's
    ('"rank": 8,', '"rank": 16,'),
    ("    # 4. Weights;", '    print("mine")\n    # 4. Weights;'),
    ("after_step(loss_fn, world)\n", "after_step(loss_fn, world)\n        del losses\n"),
)
NEWS = (  # ours, in other places
    ("# 1. Processes,", "# 1. All processes,"),
    ("\n    # 8. Train\n", '\n    world.print("news")\n    # 8. Train\n'),
)


def changed(text, *changes):
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, beside a pairtune whose recipes can become newer."""
    shutil.copytree(find.HOME / "recipes", tmp_path / "recipes")
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(find, "HOME", tmp_path)
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["tune"])
    for found in (find.own, find.names):
        found.cache_clear()
    yield tmp_path / "mine"
    for found in (find.own, find.names):
        found.cache_clear()


def copied(folder, *edits, name="my_recipe.py"):
    assert main(["cp", NAME, name]) == 0
    path = folder / name
    path.write_text(changed(path.read_text(), *edits))
    return path


def publish(folder, *news):
    path = folder.parent / "recipes" / f"{NAME}.py"
    path.write_text(changed(path.read_text(), *news))
    return path.read_text()


def without_trace(path):
    *lines, last = path.read_text().splitlines(keepends=True)
    assert last.startswith(f"# Copied from {NAME}, pairtune ")
    return "".join(lines)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_copy_with_three_edits_is_carried_over_a_changed_recipe(folder, capsys, moved, newline):
    path = copied(folder, *EDITS)
    if moved:  # with its base, which `git add .` would take along
        shutil.copytree(folder, folder.parent / "elsewhere")
        path = (folder.parent / "elsewhere" / "my_recipe.py").rename(folder.parent / "elsewhere" / "other.py")
    path.write_bytes(path.read_bytes().replace(b"\n", newline.encode()))
    path.chmod(0o750)
    before = path.read_bytes()
    news = publish(folder, *NEWS)
    assert main(["update", str(path)]) == 0
    assert without_trace(path) == changed(news, *EDITS)
    assert (b"\r\n" in path.read_bytes()) == (newline == "\r\n") and path.stat().st_mode & 0o777 == 0o750
    assert path.with_name(f"{path.name}.orig").read_bytes() == before
    assert main(["update", str(path)]) == 0  # nothing more to do, and nothing done
    assert "nothing is to be carried over" in capsys.readouterr().out
    assert not path.with_name(f"{path.name}.orig.1").exists()
    again = publish(folder, ("# 5. Optimizer,", "# 5. The optimizer,"))
    assert main(["update", str(path.with_suffix(""))]) == 0
    assert without_trace(path) == changed(again, *EDITS)
    assert path.with_name(f"{path.name}.orig").read_bytes() == before


def test_a_conflict_is_shown_with_its_lines_and_nothing_is_lost(folder, capsys):
    path = copied(folder, *EDITS)
    before = path.read_text()
    publish(folder, ('"rank": 8,', '"rank": 4,'), *NEWS)
    assert main(["update", "my_recipe.py"]) == 1
    out, lines = capsys.readouterr().out, path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("<<<<<<< "))
    last = next(number for number, line in enumerate(lines, 1) if line.startswith(">>>>>>> "))
    assert f"my_recipe.py, lines {first} to {last}:\n" in out and "1 conflict to be decided" in out
    for rank in (16, 8, 4):
        assert any(f'"rank": {rank},' in line for line in lines[first:last]) and f'"rank": {rank},' in out
    assert '    print("mine")' in lines and '    world.print("news")' in lines  # what has no conflict is carried over
    assert (folder / "my_recipe.py.orig").read_text() == before
    assert main(["update", "my_recipe.py"]) == 2
    assert f"my_recipe.py, line {first}: holds a conflict" in capsys.readouterr().err
    shutil.copyfile(folder / "my_recipe.py.orig", path)  # thought better of it: its base is still there
    assert main(["update", "my_recipe.py"]) == 1
    assert (folder / "my_recipe.py.orig").read_text() == (folder / "my_recipe.py.orig.1").read_text() == before


def test_a_copy_without_a_known_base_is_refused_and_one_that_is_named_does(folder, capsys):
    path = copied(folder, *EDITS)
    old = copied(folder, name="base.py").read_text()
    news = publish(folder, *NEWS)
    (base,) = folder.glob(".*.base")
    base.unlink()
    edited = path.read_text()
    for text, said in ((edited, f"{base.name}, is not beside it"), (without_trace(path), "has no line that says")):
        path.write_text(text)
        assert main(["update", "my_recipe.py"]) == 2
        err = capsys.readouterr().err
        assert said in err and "--base base.py" in err and err.count("\n") == 1
        assert path.read_text() == text and not (folder / "my_recipe.py.orig").exists()
    assert main(["update", "my_recipe.py", "--base", "base.py"]) == 0
    assert without_trace(path) == changed(news, *EDITS) and (folder / "base.py").read_text() == old


def test_the_checkout_of_pairtune_knows_a_text_that_it_once_shipped(folder, monkeypatch):
    path = copied(folder, *EDITS)
    git = ["git", "-C", folder.parent, "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "recipes"], ["commit", "-qm", "old"]):
        subprocess.run([*git, *words], check=True)
    news = publish(folder, *NEWS)
    for base in folder.glob(".*.base"):
        base.unlink()
    assert main(["update", "my_recipe.py"]) == 0
    assert without_trace(path) == changed(news, *EDITS)


def test_a_merge_without_git_is_refused_in_a_sentence(folder, monkeypatch, capsys):
    path = copied(folder, *EDITS)
    publish(folder, *NEWS)
    before = path.read_text()
    monkeypatch.setenv("PATH", str(folder))
    assert main(["update", "my_recipe.py"]) == 2
    assert "git merges, and is not installed" in capsys.readouterr().err
    assert path.read_text() == before and os.listdir(folder).count("my_recipe.py.orig") == 0


def test_diff_shows_what_the_copy_changed_and_nothing_else(folder, capsys):
    path = copied(folder)
    assert main(["diff", "my_recipe.py"]) == 0
    assert capsys.readouterr().out.endswith("unchanged\n")
    path.write_text(changed(path.read_text(), *EDITS))
    publish(folder, *NEWS)
    expected = ['+        "rank": 16,', '+    print("mine")', "+        del losses", '-        "rank": 8,']
    for traced in (True, False):
        if not traced:  # then the shipped recipe that it is most like
            path.write_text(without_trace(path))
        assert main(["diff", "my_recipe.py"]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = sorted(line.partition("  # ")[0] for line in lines[2:] if line[:1] in "+-" and line)
        assert all(line in found for line in expected) and (len(found) == len(expected)) == traced
        assert lines[0].startswith(f"--- {NAME}.py of pairtune") and ("another text by now" in lines[-1]) == traced
    path.write_text("print('something else')\n")
    assert main(["diff", "my_recipe.py"]) == 2
    assert "is like no recipe that is shipped" in capsys.readouterr().err
