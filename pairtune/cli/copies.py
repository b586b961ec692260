"""`tune cp`, `diff`, `update`: a copy of a recipe, what was changed in it, and the way onto a newer recipe.

The last line of a copy of ours says which text it was made from, by git's own digest of it (its blob id). That text
lies beside the copy in a hidden file that is named by recipe and digest: it goes into git with the copy, several copies
share it, and a copy that is renamed finds it. Where it is lost, pairtune's own checkout is asked. torchtune's recipes
change no more: their copies are theirs byte for byte.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from typing import NamedTuple

from pairtune import __version__
from pairtune.cli.find import SUFFIXES, find, own
from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.files import telling, write_bytes

TRACE = re.compile(rb"^# Copied from (\w+), pairtune (\S+), text ([0-9a-f]{40}).*(\n|\Z)", re.MULTILINE)
CONFLICT = re.compile(rb"^<{7} .*?^>{7} [^\n]*$", re.MULTILINE | re.DOTALL)
ALIKE = 0.5  # of the lines, without empty ones: less is no copy
COLOURS = {"+": "32", "-": "31", "@": "36"}  # of a terminal, by a line's first sign


def cp(argv: list[str]) -> int:
    """Copy a recipe or a config, to edit it; a recipe's copy runs from any folder."""
    parser = parser_of(cp)
    parser.add_argument("name", metavar="NAME", help="a recipe or config of `tune ls`")
    parser.add_argument("destination", metavar="DEST", help="a file or a folder; a missing suffix is added")
    parser.add_argument("-n", "--no-clobber", action="store_true", help="keep a file that exists")
    parser.add_argument("--make-parents", action="store_true", help="make DEST's folder where it is missing")
    args = parser.parse_args(argv)
    source = find("recipe or config", args.name, files=False)
    target = Path(args.destination).expanduser()
    if target.is_dir() or args.destination.endswith(os.sep):
        target /= source.name
    elif target.suffix not in SUFFIXES["recipe" if source.suffix == ".py" else "config"]:
        target = target.with_name(target.name + source.suffix)
    existed = target.exists()
    if existed and args.no_clobber:
        print(f"Kept {target}, which exists")
        return 0
    if args.make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; --make-parents makes it")
    try:
        shutil.copyfile(source, target)
        if source in own("recipe").values():
            _keep_base(source, target)
            with target.open("ab") as file:
                file.write(_trace(source))
    except OSError as error:  # a folder that is read-only, a target that is the source
        raise UserError(f"{target}: cannot be written: {error}") from None
    print(f"{'Replaced' if existed else 'Copied to'} {target}")
    return 0


def diff(argv: list[str]) -> int:
    """Show what a copy of a recipe changed: against the text that it was copied from, or the shipped recipe."""
    parser = parser_of(diff)
    parser.add_argument("copy", metavar="RECIPE.py", type=_path)
    parser.add_argument("--recipe", metavar="NAME", help="compare with this one as it is shipped")
    args = parser.parse_args(argv)
    copy = _read(args.copy)
    if args.recipe:
        shipped = find("recipe", args.recipe, files=False)
        base, version = shipped.read_bytes(), __version__
    else:
        shipped = _shipped(copy, args.copy)
        base = _base(copy, args.copy, shipped)
        version = copy.version if base else __version__
        base = base or shipped.read_bytes()
    named = f"{shipped.stem}.py of pairtune {version}" if shipped in own("recipe").values() else str(shipped)
    lines = list(difflib.unified_diff(_lines(base), _lines(copy.text), named, str(args.copy), lineterm=""))
    print("\n".join(_coloured(lines)) if lines else f"{args.copy} is {named}, unchanged")
    if not args.recipe and base != shipped.read_bytes():
        print(f"\n{shipped.stem} is another text by now: `tune update {args.copy}` carries these changes onto it")
    return 0


def update(argv: list[str]) -> int:
    """Carry a copy's changes onto the recipe as it is shipped now: a three-way merge by git. Status 1 on conflicts.

    What the copy was stays beside it, as RECIPE.py.orig. Conflicts are marked in the copy and shown.
    """
    parser = parser_of(update)
    parser.add_argument("copy", metavar="RECIPE.py", type=_path)
    parser.add_argument("--base", metavar="FILE", type=_path, help="the text that it was copied from, if that is lost")
    parser.add_argument("--recipe", metavar="NAME", help="onto this one; default: the one that it was copied from")
    args = parser.parse_args(argv)
    copy = _read(args.copy)
    if found := CONFLICT.search(copy.whole):
        line = copy.whole.count(b"\n", 0, found.start()) + 1
        raise UserError(
            f"{args.copy}, line {line}: holds a conflict of an earlier update; decide it, then update again"
        )
    shipped = find("recipe", args.recipe, files=False) if args.recipe else _shipped(copy, args.copy)
    base = _read(args.base).text if args.base else _base(copy, args.copy, shipped)
    if base is None:
        raise _lost(copy, args.copy, shipped.stem)
    if base == shipped.read_bytes():
        print(f"{args.copy}: {shipped.stem} is what it was when this was copied from it; nothing is to be carried over")
        return 0
    merged = _merge(copy, base, shipped.read_bytes(), args.copy.name)
    with telling(args.copy, "nothing was changed; see that its folder can be written"):
        kept = _set_aside(args.copy)
        _keep_base(shipped, args.copy)
        whole = merged + (b"" if merged.endswith(b"\n") else b"\n") + _trace(shipped)
        mode = args.copy.stat().st_mode
        write_bytes(args.copy, whole.replace(b"\n", b"\r\n") if copy.has_crlf else whole)
        args.copy.chmod(mode)
    conflicts = list(CONFLICT.finditer(merged))
    for found in conflicts:
        first = merged.count(b"\n", 0, found.start()) + 1
        last = first + found[0].count(b"\n")
        print(f"{args.copy}, lines {first} to {last}:\n{found[0].decode()}\n")
    told = f"{args.copy} is on {shipped.stem} of pairtune {__version__}; what it was is {kept}"
    many = "1 conflict" if len(conflicts) == 1 else f"{len(conflicts)} conflicts"
    print(f"{told}; {many} to be decided, where both changed the same lines" if conflicts else told)
    return 1 if conflicts else 0


# A copy, and the text that it was made from


class Copy(NamedTuple):
    """A copy: `whole` as it is but for line ends, `text` without its trace; of that recipe, version and digest."""

    whole: bytes
    text: bytes
    has_crlf: bool
    recipe: str = ""
    version: str = ""
    digest: str = ""


def _path(word: str) -> Path:
    path = Path(word).expanduser()
    with_suffix = Path(f"{path}.py")
    return with_suffix if not path.exists() and with_suffix.is_file() else path


def _read(path: Path) -> Copy:
    try:
        whole = path.read_bytes()
        whole.decode()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"{path}: cannot be read: {what}; give a copy of a recipe that `tune cp` made") from None
    has_crlf = b"\r\n" in whole
    whole = whole.replace(b"\r\n", b"\n")
    found = TRACE.search(whole)
    said = [part.decode() for part in found.groups()[:3]] if found else []
    return Copy(whole, TRACE.sub(b"", whole), has_crlf, *said)


def _trace(shipped: Path) -> bytes:
    said = (
        f"# Copied from {shipped.stem}, pairtune {__version__}, text {_digest(shipped.read_bytes())}; see tune update"
    )
    return f"{said}\n".encode()


def _digest(text: bytes) -> str:
    """The id of git's blob, by which `git cat-file` finds it."""
    return hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()


def _beside(copy: Path, recipe: str, digest: str) -> Path:
    return copy.parent / f".{recipe}.{digest[:12]}.base"


def _keep_base(shipped: Path, copy: Path) -> None:
    text = shipped.read_bytes()
    write_bytes(_beside(copy, shipped.stem, _digest(text)), text)


def _base(copy: Copy, path: Path, shipped: Path) -> bytes | None:
    """The text that a copy was made from: what is shipped, the file beside it, or of pairtune's own checkout."""
    if not copy.digest:
        return None
    for file in (own("recipe").get(copy.recipe), _beside(path, copy.recipe, copy.digest)):
        if file and file.is_file():
            text = file.read_bytes().replace(b"\r\n", b"\n")  # git may have given it this system's line ends
            if _digest(text) == copy.digest:
                return text
    if git := shutil.which("git"):
        found = subprocess.run(
            [git, "-C", shipped.parent, "cat-file", "blob", copy.digest], capture_output=True, check=False
        )
        return found.stdout if found.returncode == 0 and _digest(found.stdout) == copy.digest else None
    return None


def _lost(copy: Copy, path: Path, recipe: str) -> UserError:
    if copy.digest:
        beside = _beside(path, copy.recipe, copy.digest).name
        what, version = f"the text that it was copied from, {beside}, is not beside it", f"pairtune {copy.version}"
    else:
        what, version = "has no line that says which text it was copied from", "the pairtune that it was copied from"
    way = f"`tune cp {recipe} base.py` of {version} writes it, or it is in your git; then --base base.py"
    return UserError(f"{path}: {what}, and changes cannot be told from it; {way}")


def _shipped(copy: Copy, path: Path) -> Path:
    """The shipped recipe that a copy is of: as it says, else the one that has most lines in common with it."""
    recipes = own("recipe")
    if copy.recipe in recipes:
        return recipes[copy.recipe]
    lines = Counter(filter(str.strip, _lines(copy.text)))

    def alike(name: str) -> float:
        theirs = Counter(filter(str.strip, _lines(recipes[name].read_bytes())))
        return 2 * (lines & theirs).total() / (lines.total() + theirs.total())

    nearest = max(recipes, key=alike)
    if alike(nearest) < ALIKE:
        known = ", ".join(recipes)
        raise UserError(
            f"{path}: is like no recipe that is shipped; name the one it is a copy of: --recipe, of {known}"
        )
    return recipes[nearest]


def _lines(text: bytes) -> list[str]:
    return text.decode().splitlines()


def _coloured(lines: list[str]) -> list[str]:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return lines
    codes = ["1" if number < 2 else COLOURS.get(line[:1], "") for number, line in enumerate(lines)]
    return [f"\x1b[{code}m{line}\x1b[0m" if code else line for code, line in zip(codes, lines, strict=True)]


# The merge


def _merge(copy: Copy, base: bytes, shipped: bytes, name: str) -> bytes:
    """Returns what `git merge-file` makes of a copy, its base and the shipped recipe; conflicts are marked in it.

    Raises:
        UserError: There is no git, or it refuses.
    """
    git = shutil.which("git")
    if git is None:
        raise UserError("update: git merges, and is not installed; install it, or take `tune diff` and edit by hand")
    labels = (f"{name}, yours", "copied from", f"pairtune {__version__}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, part) for part in ("yours", "base", "shipped")]
        for file, text in zip(files, (copy.text, base, shipped), strict=True):
            file.write_bytes(text)
        words = [word for label in labels for word in ("-L", label)]
        done = subprocess.run([git, "merge-file", "-p", "--diff3", *words, *files], capture_output=True, check=False)
    if not 0 <= done.returncode < 128:  # else the number of conflicts
        raise UserError(f"update: git merge-file: {done.stderr.decode(errors='replace').strip()}; nothing was changed")
    return done.stdout


def _set_aside(path: Path) -> Path:
    """Copies a file to the first of NAME.orig, NAME.orig.1, ... that is free; returns which."""
    for number in count():
        kept = path.with_name(f"{path.name}.orig{f'.{number}' if number else ''}")
        try:
            with kept.open("xb") as file:
                file.write(path.read_bytes())
            return kept
        except FileExistsError:
            continue
    raise AssertionError
