"""Where pairs are: a file, a folder or a data set of the Hub; and whether it is there. Nothing is read or imported."""

import difflib
import re
from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import ROW_FILES


def check_source(source: str, key: str) -> None:
    """Refuses a file or folder that is not there; what can be a Hub id is not looked for.

    Args:
        key: Where the config describes the rows, for messages.

    Raises:
        UserError: With the nearest that is there.
    """
    path = Path(source).expanduser()
    if not _exists(path, key) and looks_like_path(source):
        raise _missing_file(path, key)


def looks_like_path(source: str) -> bool:
    """Returns whether a source is no Hub id, which is ORG/NAME or a bare name without a suffix."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return Path(source.removesuffix(".gz")).suffix in ROW_FILES
    return not re.fullmatch(r"[\w-]+", source)


def _exists(path: Path, key: str) -> bool:
    try:
        exists = path.exists()
    except OSError as error:  # a folder that may not be entered, a name too long
        raise UserError(f"{key}.source={path}: cannot be read: {error.strerror}.") from error
    if exists and not (path.is_file() or path.is_dir()):
        raise UserError(f"{key}.source={path}: is neither a file nor a folder.")
    return exists


def _missing_file(path: Path, key: str) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"{key}.source={path}: there is no folder {path.parent}.")
    entries = sorted(path.parent.iterdir())
    rows = [entry.name for entry in entries if Path(entry.name.removesuffix(".gz")).suffix in ROW_FILES]
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(path.name, rows, n=5, cutoff=0.3) or rows[:5]
    near += difflib.get_close_matches(path.name, folders, n=2)
    here = path.parent.resolve()
    hint = f"Nearest in {here}: {', '.join(near)}" if near else f"{here} has no file that could hold rows"
    return UserError(f"{key}.source={path}: there is no such file. {hint}.")
