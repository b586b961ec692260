"""Fetches a model or a data set from the Hugging Face Hub, or a mirror that speaks its protocol, into a folder.

Of a model only what training reads: a repository often holds its weights two or three times over. What has arrived
stays: huggingface_hub's own downloads start a file that broke off anew, so files come through its `http_get`, which
goes on at the byte where a file ended, and get their names when their checksums are the repository's. What was fetched
is noted in the folder, so that another revision takes the place of the first and leaves a user's own files alone.
Nothing here imports torch.
"""

import errno
import hashlib
import io
import json
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    filter_repo_objects,
    hf_raise_for_status,
    http_backoff,
    tqdm,
)

from pairtune.errors import UserError

REPO_ID_FILE = "original_repo_id.json"  # torchtune's name; by it an exported adapter tells which model it belongs to
BOOKKEEPING = ".cache/pairtune"  # in the folder, beside huggingface_hub's; hidden, so that no data set is read from it
RECORD = f"{BOOKKEEPING}/fetched.jsonl"  # what came from where: a row of Record's fields, then one for each File
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What a run looks for in a folder, in this order: a model's weights, and an adapter's.
LOADED = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
LOADED_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel")
# Weights a second time, where safetensors exist. Not all of original/: Llama 3's tokenizer.model is only there.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.safetensors")
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model-*-of-*.safetensors")
# What the training of the repository's model left behind: intermediate checkpoints, and what it would resume from.
TRAINING_STATES = ("checkpoint[-_][0-9]*/*", "*/checkpoint[-_][0-9]*/*", "global_step[0-9]*/*", "trainer_state.json")
TRAINING_STATES += ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")
THREADS = 8  # files at a time
LARGEST = 50 * 10**9  # bytes; above that the Hub serves a file through Xet only
WAITS = (1, 2, 4, 8)  # seconds before each further attempt, where an answer does not say how many
BUSY = (500, 502, 503, 504)  # answers that are worth another attempt; http_get sees to 429 itself
# The client's HTTP library was requests, then httpx, then httpx2; its errors are what HfHubHTTPError derives from.
UNREACHABLE = (OSError, *HfHubHTTPError.__bases__)
NO_HUB = (ValueError, KeyError, TypeError, AttributeError)  # what the client makes of an answer that is not the Hub's


class Unreachable(UserError):
    """The Hub cannot be asked: what depends on its answer is not known, what follows from names and rules is."""


@dataclass(frozen=True)
class Source:
    """A repository and where to ask for it; `endpoint` is None for HF_ENDPOINT or else huggingface.co."""

    repo_id: str
    repo_type: str = "model"  # or "dataset"
    revision: str | None = None
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The endpoint's address."""
        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        """The repository's page, for people."""
        return f"{self.host}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def sent_token(self) -> str | bool:
        """Returns the token to send: `token`, else HF_TOKEN's, else what `hf auth login` stored; False for none.

        Asked for anew before each request: the client renews stored tokens that expire.

        Raises:
            UserError: There is one that cannot be sent. The message does not show it.
        """
        where, found = "--hf-token", self.token
        if found is None:
            where = "HF_TOKEN or what `hf auth login` stored"
            try:
                found = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{where}: cannot be read ({type(error).__name__}); give another token: --hf-token TOKEN"
                ) from None
            if found is None:
                return False
        token = found.strip()
        if not token:
            raise UserError(f"{where}: is empty; give a token, or leave the option out")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise UserError(
                f"{where}: holds a space, a line break or another character that no token has; copy the token again"
            )
        return token

    def __str__(self) -> str:
        return f"{self.kind} {self.repo_id} ({self.revision or 'main'}) from {self.host}"

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "data set" if self.repo_type == "dataset" else "model"


@dataclass(frozen=True)
class File:
    """A file as the repository states it; the checksum is LFS's SHA-256 or git's SHA-1, "" where none is stated."""

    name: str
    size: int  # bytes
    checksum: str


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
        commit = _patiently(lambda: api.repo_info(source.repo_id, **asked).sha, (429, *BUSY))
        # By commit: what is listed is what comes, also when somebody pushes meanwhile.
        source = replace(source, revision=commit or source.revision)
        files = list(_list_files(source))
    except (HFValidationError, *UNREACHABLE) as error:
        raise _explained(error, source) from error
    except NO_HUB as error:
        raise Unreachable(
            f"{source.host} does not answer as the Hub does ({type(error).__name__}: {_first_line(error, source)}); "
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
                (planned.folder / REPO_ID_FILE).write_text(json.dumps({"repo_id": planned.source.repo_id}, indent=4))
    except (HFValidationError, *UNREACHABLE) as error:
        raise _explained(error, planned.source, planned.folder) from error


def read_json(planned: Plan, name: str) -> dict | None:
    """Returns a small file's content without writing it: from the folder, else from the Hub; None if there is none.

    Raises:
        UserError: It cannot be fetched or is no JSON object.
    """
    file = next((file for file in planned.files if file.name == name), None)
    if file is None:
        return None
    try:
        if _is_whole(planned.folder / name, file):
            return _parse((planned.folder / name).read_bytes(), planned.folder / name)
        content = io.BytesIO()
        _get(planned.source, file, content, lambda count: None)
        return _parse(content.getvalue(), f"{planned.source.repo_id}: {name}")
    except UNREACHABLE as error:
        raise _explained(error, planned.source, planned.folder) from error


def unread(files: list[str]) -> list[str]:
    """Returns those of a model's files that DPO does not read.

    Weights for other frameworks always; .bin, .pth and further safetensors only beside the model's own safetensors,
    which are those in the root under the names that transformers saves; what its training left behind only where the
    root holds a model or an adapter.
    """
    patterns = OTHER_FRAMEWORKS
    if any(_is_own_weights(name) for name in files):
        patterns += OTHER_WEIGHTS
    if any(_is_own_weights(name) or name in LOADED + LOADED_ADAPTER for name in files):
        patterns += TRAINING_STATES
    if LOADED_ADAPTER[0] in files:
        patterns += LOADED_ADAPTER[1:]
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


def _list_files(source: Source) -> Iterator[File]:
    """Yields the files of a repository at a commit. A list of many comes in pages, each of which names the next."""
    url = f"{source.host}/api/{source.repo_type}s/{source.repo_id}/tree/{quote(source.revision or 'main', safe='')}"
    url += "?recursive=true"
    while url:
        # As a mirror may send on to the Hub's own pages: the token goes to the endpoint alone.
        token = source.sent_token() if _origin(url) == _origin(source.host) else False
        answer = http_backoff("GET", url, headers=build_hf_headers(token=token), timeout=30)
        hf_raise_for_status(answer)
        for row in answer.json():
            if row["type"] == "file":
                stated = row.get("lfs") or row
                is_checksum = re.fullmatch("[0-9a-f]{64}" if row.get("lfs") else "[0-9a-f]{40}", stated["oid"] or "")
                yield File(row["path"], int(stated["size"]), stated["oid"] if is_checksum else "")
        url = answer.links.get("next", {}).get("url")


def _origin(url: str) -> tuple[str, str]:
    return urlsplit(url).scheme, urlsplit(url).netloc.lower()


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
            _get(planned.source, file, content, update)
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


def _get(source: Source, file: File, content: BinaryIO, update: Callable[[int], None]) -> None:
    """Appends to `content` what it lacks of a file; asks for nothing where nothing is missing.

    The token goes to the endpoint alone: where it leads elsewhere, as to the Hub's file store, the client drops it.
    """
    url = hf_hub_url(
        source.repo_id, file.name, repo_type=source.repo_type, revision=source.revision, endpoint=source.endpoint
    )
    # Not compressed: what arrived is counted in the file's own bytes.
    headers = build_hf_headers(token=source.sent_token()) | {"Accept-Encoding": "identity"}
    to = {"headers": headers, "expected_size": file.size, "tqdm_class": _relay(update)}
    _patiently(lambda: http_get(url, content, resume_size=content.tell(), **to), BUSY)


def _patiently(ask: Callable, busy: tuple[int, ...]):
    """Returns what `ask` returns; asks again a few times, waiting ever longer, while a status of `busy` answers."""
    for wait in WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            status, said = error.response.status_code, error.response.headers.get("Retry-After", "")
            if status not in busy:
                raise
            seconds = int(said) if said.isdecimal() else wait
            print(f"{error.response.url.host} answers {status}; asking again in {seconds} s")
            time.sleep(seconds)
    return ask()


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


def _relay(update: Callable[[int], None]) -> type:
    """Returns what `http_get` takes for a progress bar, where one bar counts all files."""

    class Relay:
        def __init__(self, **kwargs):
            self.update = update

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    return Relay


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
        held.append((_parse((folder / REPO_ID_FILE).read_bytes(), folder / REPO_ID_FILE).get("repo_id"), "model"))
    for repo_id, repo_type in held:
        if (repo_id, repo_type) != (source.repo_id, source.repo_type):
            raise UserError(f"{folder} holds {repo_id}; give {source.repo_id} a folder of its own with --output-dir")


def _check_strangers(planned: Plan) -> None:
    """A run must not find weights of a user's before those of the plan."""
    names = {file.name for file in planned.files}
    for order in (LOADED, LOADED_ADAPTER) if planned.source.repo_type == "model" else ():
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
        raise UserError(_no_space(planned.folder, f"{show_size(needed)} needed, {show_size(free)} free"))


def _check_index(planned: Plan) -> None:
    """Every shard that an index names is in the repository; that those are here and whole is checked one by one."""
    known = {file.name for file in planned.files + planned.left_out}
    for name in {file.name for file in planned.files} & set(INDEX_FILES):
        shards = _parse((planned.folder / name).read_bytes(), planned.folder / name).get("weight_map")
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
    rows = [_parse(row, path) for row in path.read_bytes().split(b"\n")[:-1]]  # without one that broke off
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
    path.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in (head, *map(asdict, files))))
    path.with_suffix(".new").replace(path)


def _note(folder: Path, file: File) -> None:
    with (folder / RECORD).open("a") as record:  # one write: threads do not mix their rows
        record.write(json.dumps(asdict(file)) + "\n")


def _parse(content: bytes, where: str | Path) -> dict:
    """Returns a JSON object; `where` it stands is for the message."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}; another --revision, or another folder: --output-dir") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: is no JSON object; another --revision, or another folder: --output-dir")
    return found


# What went wrong


def _explained(error: Exception, source: Source, folder: Path | None = None) -> UserError:
    """Returns what went wrong and the way out, in one sentence or two. `folder` is None while the Hub is asked."""
    repo, host, said = source.repo_id, source.host, _first_line(error, source)
    login = "--hf-token TOKEN, or HF_TOKEN, or `hf auth login`"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return UserError(f"{repo}: a {source.kind} is named owner/name, as on {host}")
    elsewhere = urlsplit(str(error.response.url)).netloc if status else None
    if elsewhere not in (None, urlsplit(host).netloc.lower()):
        return UserError(
            f"{repo}: {elsewhere}, to which {host} leads, answers {status}: the address may have expired, or a proxy "
            f"may forbid it; the same command again asks for a new one (a token goes to {host} only)"
        )
    if isinstance(error, GatedRepoError) and status == 403:
        return UserError(
            f"{repo} is gated, and your token has no access to it: accept its licence at {source.page}, wait where its "
            f"owners grant access by hand, or give another token: {login}"
        )
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo} is gated: accept its licence at {source.page}, then give your token: {login}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{repo} has no revision {source.revision}; its branches and tags are at {source.page}/tree/main"
        )
    if isinstance(error, RepositoryNotFoundError):
        other = "; a data set: --repo-type dataset" if source.repo_type == "model" else "; a model: without --repo-type"
        return UserError(f"{repo}: no such {source.kind} at {host}, or a private one; if it is yours: {login}{other}")
    if isinstance(error, DisabledRepoError):
        return UserError(f"{repo}: is disabled, by its owners or the Hub ({source.page}); no token helps, take another")
    if status in (401, 403) and not source.sent_token():
        return UserError(
            f"{repo}: {host} answers {status} without a token ({said}); a proxy may forbid it, or "
            f"it needs your token: {login}"
        )
    if status == 401:
        return UserError(
            f"{repo}: {host} does not know your token ({said}), which may be mistyped, expired or "
            f"revoked; another one: {login}"
        )
    if status == 403:
        return UserError(
            f"{repo}: {host} forbids it to your token ({said}); allow it to read this repository at "
            f"{host}/settings/tokens, or give another one: {login}"
        )
    if status is not None:
        return UserError(f"{repo}: {host} answers with an error, try later: {said}")
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable(f"{repo}: HF_HUB_OFFLINE is set, so {host} is not asked; unset it to download")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(_no_space(folder, "the disk is full"))
    if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a connection
        return UserError(f"{folder}: cannot be written ({error}); another folder: --output-dir DIR")
    why = f"({type(error).__name__}: {said})"
    if folder is None:
        return Unreachable(
            f"{repo}: {host} cannot be reached {why}; check the network, or another host: --endpoint URL"
        )
    return UserError(
        f"{repo}: the connection to {host} broke off {why}; the same command again goes on where it stopped"
    )


def _no_space(folder: Path, why: str) -> str:
    return f"{folder}: {why}; another disk: --output-dir DIR"


def _first_line(error: Exception, source: Source) -> str:
    """Returns what an error says, without the token: a server may send back what it was sent."""
    line, token = str(error).strip().partition("\n")[0], source.sent_token()
    return line.replace(token, "***") if token else line
