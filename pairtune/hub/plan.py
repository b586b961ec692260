"""What a download consists of, before a byte of it is fetched. Nothing here imports torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects

from pairtune.config.layout import ADAPTER_FILES, MODEL_FILES, REPO_ID_FILE
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.hub.choice import unread
from pairtune.hub.http import BUSY, UNREACHABLE, File, Source, Unreachable, explained, first_line, list_files, patiently
from pairtune.hub.record import ANOTHER, BOOKKEEPING, Record, is_inside, read_record

NO_HUB = (ValueError, KeyError, TypeError, AttributeError)  # what the client makes of an answer that is not the Hub's


@dataclass(frozen=True)
class Plan:
    """What a download consists of: `files` come, `left_out` do not. `source.revision` is a commit."""

    source: Source
    folder: Path
    files: list[File]
    left_out: list[File]
    default_choice: bool  # of what is left out
    fetched: list[File]  # by this command, earlier

    def part(self, file: File) -> Path:
        """Returns where a file lies until it is whole; by content, so that no two versions are joined."""
        return self.folder / BOOKKEEPING / "parts" / f"{file.name}.{file.checksum or self.source.revision}"

    def to_come(self, files: list[File]) -> int:
        """Returns the bytes of these files that are still to be fetched."""
        return sum(file.size - min(size_of(self.part(file)), file.size) for file in files)

    def missing(self) -> int:
        """Returns the bytes that are still to be fetched, going by sizes."""
        return self.to_come([file for file in self.files if size_of(self.folder / file.name) != file.size])

    def stale(self) -> list[File]:
        """Returns what was fetched earlier and is not in the repository any more, or not as it was."""
        names, known = {file.name for file in self.files}, {*self.files, *self.left_out}
        stale = [f for f in self.fetched if f.name not in names and f not in known]
        return sorted((f for f in stale if (self.folder / f.name).is_file()), key=lambda f: f.name)

    def strangers(self) -> list[str]:
        """Returns the files beside the plan's that this command did not fetch."""
        known = {file.name for file in self.files + self.fetched} | {REPO_ID_FILE}
        places = {self.folder, *((self.folder / file.name).parent for file in self.files)}
        found = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
        names = sorted(path.relative_to(self.folder).as_posix() for path in found if not path.name.startswith("."))
        return [name for name in names if name not in known]

    def __str__(self) -> str:
        total, missing = sum(file.size for file in self.files), self.missing()
        lines = [f"{self.source}, to {self.folder}"]
        lines += [f"{show_size(file.size):>12}  {file.name}" for file in self.files]
        there = f", of which {show_size(total - missing)} are there" if missing < total else ""
        lines.append(f"{show_size(total):>12}  together, {len(self.files)} files{there}")
        if self.left_out:
            size = show_size(sum(file.size for file in self.left_out))
            why = "which training does not read (--ignore-patterns without a pattern fetches all)"
            lines.append(f"Left out: {len(self.left_out)} files, {size}{', ' + why if self.default_choice else ''}:")
            lines.append("  " + ", ".join(file.name for file in self.left_out))
        if stale := self.stale():
            lines.append("Fetched earlier and not in this revision, to be removed:")
            lines.append("  " + ", ".join(file.name for file in stale))
        if strangers := self.strangers():
            lines.append("In the folder and not of this download, left as they are:")
            lines.append("  " + ", ".join(strangers))
        return "\n".join(lines)


def plan_download(source: Source, output_dir: Path, *, ignore_patterns: list[str] | None = None) -> Plan:
    """Returns what to fetch into `output_dir`; asks the Hub for its list of files, and writes nothing.

    `ignore_patterns` replaces the default choice of what to leave out (`unread`); an empty list leaves out nothing.

    Raises:
        Unreachable: No network, or an endpoint that does not answer as the Hub does.
        UserError: No such repository or revision, no access, a token that cannot be sent; in `output_dir` another
            repository, or weights of a user's that a run would take for this one's.
    """
    folder = Path(output_dir).expanduser().absolute()
    _check_endpoint(source)
    record = read_record(folder)
    _check_folder(folder, source, record)
    api = HfApi(endpoint=source.endpoint, token=source.sent_token())
    try:
        asked = {"revision": source.revision, "repo_type": source.repo_type, "timeout": 30}
        commit = patiently(lambda: api.repo_info(source.repo_id, **asked).sha, (429, *BUSY))
        # By commit: what is listed is what comes, also when somebody pushes meanwhile.
        source = replace(source, revision=commit or source.revision)
        files = list(list_files(source))
    except (HFValidationError, *UNREACHABLE) as error:
        raise explained(error, source) from error
    except NO_HUB as error:
        raise Unreachable(
            f"{source.host} does not answer as the Hub does ({type(error).__name__}: {first_line(error, source)}); "
            "--endpoint and HF_ENDPOINT take the Hub or a mirror of it that speaks its protocol"
        ) from error
    names = [file.name for file in files]
    if outside := [name for name in names if not is_inside(name)]:  # it comes from outside and becomes a path here
        raise UserError(f"{outside[0]}: a file of this name would lie outside of the folder; nothing was fetched")
    if ignore_patterns is not None:
        left_out = set(names) - set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
    else:
        left_out = set(unread(names)) if source.repo_type == "model" else set()
    planned = Plan(
        source,
        folder,
        [file for file in files if file.name not in left_out],
        [file for file in files if file.name in left_out],
        default_choice=ignore_patterns is None,
        fetched=record.files if record else [],
    )
    _check_strangers(planned)
    return planned


def _check_endpoint(source: Source) -> None:
    try:
        address = urlsplit(source.host)
        is_url = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise UserError(f"endpoint {source.host}: must be a URL, such as https://huggingface.co")
    if address.username is not None:
        raise UserError(f"endpoint at {address.hostname}: a URL with a password would be shown; HF_TOKEN takes a token")
    if address.netloc.endswith(("modelscope.cn", "modelscope.ai")):
        name = source.repo_id.rpartition("/")[2]
        raise UserError(
            f"endpoint {source.host}: ModelScope does not speak the Hub's protocol; its own client fetches the same "
            f"files (`modelscope download --{source.repo_type} {source.repo_id} --local_dir /tmp/{name}`), for "
            f"{'checkpointer.checkpoint_dir' if source.repo_type == 'model' else 'dataset.source'}=/tmp/{name}"
        )


def _check_folder(folder: Path, source: Source, record: Record | None) -> None:
    """Two models in one folder would be read as one: same default folder for models that differ only in owner."""
    held = []
    if record and any((folder / file.name).is_file() for file in record.files):
        held.append((record.repo_id, record.repo_type))
    if (folder / REPO_ID_FILE).is_file():
        held.append((read_object(folder / REPO_ID_FILE, way_out=ANOTHER).get("repo_id"), "model"))
    for repo_id, repo_type in held:
        if (repo_id, repo_type) != (source.repo_id, source.repo_type):
            raise UserError(f"{folder} holds {repo_id}; give {source.repo_id} a folder of its own with --output-dir")


def _check_strangers(planned: Plan) -> None:
    """A run must not find weights of a user's before those of the plan."""
    names = {file.name for file in planned.files}
    for order in (MODEL_FILES, ADAPTER_FILES) if planned.source.repo_type == "model" else ():
        first = next((n for n, name in enumerate(order) if name in names), 0)
        if before := [name for name in order[:first] if name in planned.strangers()]:
            raise in_the_way(planned, before)


def in_the_way(planned: Plan, names: list[str]) -> UserError:
    """Returns what to say of files that are not to be overwritten."""
    return UserError(
        f"{planned.folder}: in the way: {', '.join(names)}; not written by `tune download`, or changed since, and "
        f"{planned.source.repo_id} has another file in its place or none at {planned.source.revision}; move it out of "
        "the folder, or download to another one: --output-dir DIR"
    )


def show_size(size: int) -> str:
    """Returns bytes for people: `512 B`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def size_of(path: Path) -> int:
    """Returns the bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
