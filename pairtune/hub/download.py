"""Fetches a model or a data set from the Hugging Face Hub, or a mirror that speaks its protocol, into a folder.

Of a model only what training reads: a repository often holds its weights two or three times over. What has arrived
stays: huggingface_hub's own downloads start a file that broke off anew, so files come through its `http_get`, which
goes on at the byte where a file ended, and get their names when their checksums are the repository's. What was fetched
is noted in the folder, so that another revision takes the place of the first and leaves a user's own files alone.
Requests and their errors are in http.py. Nothing here imports torch.
"""

import hashlib
import io
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, filter_repo_objects, tqdm

from pairtune.errors import UserError
from pairtune.files import parse_object, read_object, write_text
from pairtune.folders.layout import ADAPTER_FILES, INDEX_FILES, MODEL_FILES, REPO_ID_FILE
from pairtune.hub.http import (
    BUSY,
    UNREACHABLE,
    File,
    Source,
    Unreachable,
    explained,
    first_line,
    get,
    list_files,
    no_space,
    patiently,
)

BOOKKEEPING = ".cache/pairtune"  # in the folder, beside huggingface_hub's; hidden, so that no data set is read from it
RECORD = f"{BOOKKEEPING}/fetched.jsonl"  # what came from where: a row of Record's fields, then one for each File
OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel")
# Weights a second time, where safetensors exist. Not all of original/: Llama 3's tokenizer.model is only there.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.safetensors")
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model-*-of-*.safetensors")
# What the training of the repository's model left behind: intermediate checkpoints, and what it would resume from.
TRAINING_STATES = ("checkpoint[-_][0-9]*/*", "*/checkpoint[-_][0-9]*/*", "global_step[0-9]*/*", "trainer_state.json")
TRAINING_STATES += ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")
THREADS = 8  # files at a time
ANOTHER = "another --revision, or another folder: --output-dir"
LARGEST = 50 * 10**9  # bytes; above that the Hub serves a file through Xet only
NO_HUB = (ValueError, KeyError, TypeError, AttributeError)  # what the client makes of an answer that is not the Hub's


@dataclass(frozen=True)
class Record:
    """What this command fetched into a folder; `revision` is a commit."""

    repo_id: str
    repo_type: str
    revision: str | None
    files: list[File]


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
        return sum(file.size - min(_size(self.part(file)), file.size) for file in files)

    def missing(self) -> int:
        """Returns the bytes that are still to be fetched, going by sizes."""
        return self.to_come([file for file in self.files if _size(self.folder / file.name) != file.size])

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


def plan(source: Source, output_dir: Path, *, ignore_patterns: list[str] | None = None) -> Plan:
    """Returns what to fetch into `output_dir`; asks the Hub for its list of files, and writes nothing.

    `ignore_patterns` replaces the default choice of what to leave out (`unread`); an empty list leaves out nothing.

    Raises:
        Unreachable: No network, or an endpoint that does not answer as the Hub does.
        UserError: No such repository or revision, no access, a token that cannot be sent; in `output_dir` another
            repository, or weights of a user's that a run would take for this one's.
    """
    folder = Path(output_dir).expanduser().absolute()
    _check_endpoint(source)
    record = _read_record(folder)
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
    if outside := [name for name in names if not _is_inside(name)]:  # it comes from outside and becomes a path here
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


def fetch(planned: Plan) -> None:
    """Fetches what is not there, or there with other bytes, and checks it; on return the folder is complete.

    Removes what an earlier call fetched and the plan lacks, and nothing else.

    Raises:
        UserError: No access, no network, no space, no right to write, bytes that are not those that the repository
            states, a shard that an index names and the repository does not hold. What has arrived stays. A file of a
            user's in the place of one to be fetched, or one to be removed that has changed: nothing is touched.
    """
    try:
        with _alone(planned.folder):
            missing = _make_way(planned)
            with _bar("Fetching", planned.to_come(missing)) as update:
                indexes = [file for file in missing if file.name in INDEX_FILES]
                for index in indexes:  # before the weights: what is not whole in the repository is told at once
                    _fetch_file(planned, index, update)
                _check_index(planned)
                others = [file for file in missing if file not in indexes]
                _in_threads(lambda file: _fetch_file(planned, file, update), others)
            shutil.rmtree(planned.folder / BOOKKEEPING / "parts", ignore_errors=True)
            if planned.source.repo_type == "model":
                origin = {"repo_id": planned.source.repo_id, "revision": planned.source.revision}
                (planned.folder / REPO_ID_FILE).write_text(json.dumps(origin, indent=4))
    except (HFValidationError, *UNREACHABLE) as error:
        raise explained(error, planned.source, planned.folder) from error


def fetch_json(planned: Plan, name: str) -> dict | None:
    """Returns a small file's content without writing it: from the folder, else from the Hub; None if there is none.

    Raises:
        UserError: It cannot be fetched or is no JSON object.
    """
    file = next((file for file in planned.files if file.name == name), None)
    if file is None:
        return None
    try:
        if _is_whole(planned.folder / name, file):
            return read_object(planned.folder / name, way_out=ANOTHER)
        content = io.BytesIO()
        get(planned.source, file, content, lambda count: None)
        return parse_object(content.getvalue(), f"{planned.source.repo_id}: {name}", way_out=ANOTHER)
    except UNREACHABLE as error:
        raise explained(error, planned.source, planned.folder) from error


def unread(files: list[str]) -> list[str]:
    """Returns those of a model's files that DPO does not read.

    Weights for other frameworks always; .bin, .pth and further safetensors only beside the model's own safetensors,
    which are those in the root under the names that transformers saves; what its training left behind only where the
    root holds a model or an adapter.
    """
    patterns = OTHER_FRAMEWORKS
    if any(_is_own_weights(name) for name in files):
        patterns += OTHER_WEIGHTS
    if any(_is_own_weights(name) or name in MODEL_FILES + ADAPTER_FILES for name in files):
        patterns += TRAINING_STATES
    if ADAPTER_FILES[0] in files:
        patterns += ADAPTER_FILES[1:]
    return [name for name in files if not _is_own_weights(name) and any(fnmatch(name, p) for p in patterns)]


def rules() -> str:
    """Says what `unread` leaves out, for when a repository's files are not known."""
    always, own, others = ", ".join(OTHER_FRAMEWORKS), " or ".join(OWN_WEIGHTS), ", ".join(OTHER_WEIGHTS)
    states = ", ".join(TRAINING_STATES)
    return f"{always}; beside weights of its own {states}; where there are {own}, also other {others}"


def show_size(size: int) -> str:
    """Returns bytes for people: `512 B`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# Files


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_own_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in OWN_WEIGHTS)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_whole(path: Path, file: File, update: Callable[[int], None] = lambda count: None) -> bool:
    """Says whether a file has the size and the checksum that the repository states; `update` hears of bytes read."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % file.size) if len(file.checksum) == 40 else hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
            update(len(chunk))
    return file.checksum in ("", digest.hexdigest())


def _make_way(planned: Plan) -> list[File]:
    """Returns the files that are to be fetched. Those that are there are read and checked.

    Of what this command fetched earlier, files that are to be fetched again and files that the plan lacks are removed.
    """
    there = [file for file in planned.files if (planned.folder / file.name).is_file()]
    stale, whole = planned.stale(), set()
    with _bar("Checking", sum(file.size for file in there + stale)) as update:
        _in_threads(lambda file: _is_whole(planned.folder / file.name, file, update) and whole.add(file), there + stale)
    fetched = {file.name for file in planned.fetched}
    wrong = [file for file in there if file not in whole]
    own = [file.name for file in wrong if file.name not in fetched] + [f.name for f in stale if f not in whole]
    if own:
        raise _in_the_way(planned, own)
    missing = [file for file in planned.files if file not in whole]
    _check_space(planned, missing, leaving=wrong + stale)
    for file in wrong:
        print(f"{planned.folder / file.name}: is not the repository's, or not whole; fetching it again")
    for file in wrong + stale:
        (planned.folder / file.name).unlink()
    kept = [file for file in planned.files if file in whole and file.name in fetched]
    kept += [file for file in planned.left_out if file in planned.fetched]
    _write_record(planned, kept)
    return missing


def _fetch_file(planned: Plan, file: File, update: Callable[[int], None]) -> None:
    """Brings a file to its place, whole; goes on where an earlier attempt ended."""
    if file.size > LARGEST:
        raise UserError(
            f"{file.name}: has {show_size(file.size)}, and the Hub serves files above 50 GB to its own tool only: `hf "
            f"download {planned.source.repo_id} {file.name} --repo-type {planned.source.repo_type} --local-dir "
            f"{planned.folder}`; then the same command again"
        )
    part, target = planned.part(file), planned.folder / file.name
    part.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in ("first", "last"):
        if _size(part) > file.size:  # an endpoint that sent more than it stated
            part.unlink()
        with part.open("ab") as content:
            get(planned.source, file, content, update)
        if _is_whole(part, file):
            _note(planned.folder, file)  # before it is there, so that it never is a file of unknown origin
            part.replace(target)
            return
        part.unlink()
        if attempt == "first":
            print(f"{file.name}: what arrived has not the checksum that the repository states; fetching it again")
            update(-file.size)
    raise UserError(
        f"{file.name}: {planned.source.host} sends other bytes than the repository states (checksum {file.checksum}), "
        "twice; a proxy or a mirror may have spoilt them: the same command again fetches this file anew, --endpoint "
        "URL from elsewhere"
    )


# Progress


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes on a terminal; yields what counts them, from any thread."""
    if not total:
        yield lambda count: None
        return
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def update(count: int) -> None:
            with bar.get_lock():
                bar.update(count)

        yield update


def _in_threads(work: Callable, items: list) -> None:
    """Calls `work` for each item, THREADS at a time; raises the first error when the calls under way have ended.

    Daemons: Ctrl-C need not wait for what is being read.
    """
    waiting, errors = deque(items), []

    def loop() -> None:
        while not errors:
            try:
                item = waiting.popleft()
            except IndexError:  # nothing waits any more
                return
            try:
                work(item)
            except Exception as error:  # boundary of the thread
                errors.append(error)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(min(THREADS, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# Checks


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
            raise _in_the_way(planned, before)


def _in_the_way(planned: Plan, names: list[str]) -> UserError:
    return UserError(
        f"{planned.folder}: in the way: {', '.join(names)}; not written by `tune download`, or changed since, and "
        f"{planned.source.repo_id} has another file in its place or none at {planned.source.revision}; move it out of "
        "the folder, or download to another one: --output-dir DIR"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two downloads into one folder would write into the same parts."""
    (folder / BOOKKEEPING).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / BOOKKEEPING / "lock", timeout=0.1))
        except TimeoutError:
            raise UserError(f"{folder}: another `tune download` is writing there; wait for its end") from None
        yield


def _check_space(planned: Plan, missing: list[File], leaving: list[File]) -> None:
    needed = planned.to_come(missing)
    free = shutil.disk_usage(planned.folder).free + sum(_size(planned.folder / file.name) for file in leaving)
    if needed > free:
        raise UserError(no_space(planned.folder, f"{show_size(needed)} needed, {show_size(free)} free"))


def _check_index(planned: Plan) -> None:
    """Every shard that an index names is in the repository; that those are here and whole is checked one by one."""
    known = {file.name for file in planned.files + planned.left_out}
    for name in {file.name for file in planned.files} & set(INDEX_FILES):
        shards = read_object(planned.folder / name, way_out=ANOTHER).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{planned.folder / name}: has no weight_map, the shard of each weight; another --revision")
        if lost := sorted(set(shards.values()) - known):
            raise UserError(
                f"{planned.folder}: {name} names {', '.join(lost)}, which the repository does not hold: its upload is "
                "incomplete; take another --revision"
            )


# The record


def _read_record(folder: Path) -> Record | None:
    """Returns what was noted of a folder, None where nothing was."""
    path = folder / RECORD
    if not path.is_file():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]  # without one that broke off
    rows = [parse_object(line, path, way_out=ANOTHER) for line in lines]
    try:
        record = Record(**rows[0], files=[File(**row) for row in rows[1:]])
    except (IndexError, TypeError) as error:
        raise UserError(f"{path}: is no record of a download ({error}); another folder: --output-dir DIR") from None
    if outside := [file.name for file in record.files if not _is_inside(file.name)]:
        raise UserError(f"{path}: names {outside[0]}, which is outside of the folder; another folder: --output-dir DIR")
    return record


def _write_record(planned: Plan, files: list[File]) -> None:
    source, path = planned.source, planned.folder / RECORD
    head = {"repo_id": source.repo_id, "repo_type": source.repo_type, "revision": source.revision}
    write_text(path, "".join(json.dumps(row) + "\n" for row in (head, *map(asdict, files))))


def _note(folder: Path, file: File) -> None:
    with (folder / RECORD).open("a") as record:  # one write: threads do not mix their rows
        record.write(json.dumps(asdict(file)) + "\n")
