"""Fetches a model or a data set from the Hugging Face Hub, or a mirror that speaks its protocol, into a folder.

Of a model only what training reads: a repository often holds its weights two or three times over. What has arrived
stays: huggingface_hub's own downloads start a file that broke off anew, so files come through its `http_get`, which
goes on at the byte where a file ended, and get their names when their checksums are the repository's. Nothing here
imports torch.
"""

import errno
import hashlib
import io
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
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
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects, tqdm

from pairtune.errors import UserError

REPO_ID_FILE = "original_repo_id.json"  # torchtune's name; by it an exported adapter tells which model it belongs to
BOOKKEEPING = ".cache/pairtune"  # in the folder, beside huggingface_hub's; hidden, so that no data set is read from it
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel")
# Weights a second time, where safetensors exist. Not all of original/: Llama 3's tokenizer.model is only there.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.safetensors")
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
THREADS = 8  # files at a time
LARGEST = 50 * 10**9  # bytes; above that the Hub serves a file through Xet only
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
class Plan:
    """What a download consists of: `files` come, `left_out` do not. `source.revision` is a commit."""

    source: Source
    folder: Path
    files: list[File]
    left_out: list[File]
    default_choice: bool  # of what is left out

    def part(self, file: File) -> Path:
        """Returns where a file lies until it is whole; by content, so that no two versions are joined."""
        return self.folder / BOOKKEEPING / "parts" / f"{file.name}.{file.checksum or self.source.revision}"

    def missing(self) -> int:
        """Returns the bytes that are still to be fetched, going by sizes."""
        there = {file.name: _size(self.folder / file.name) for file in self.files}
        return sum(
            file.size - min(_size(self.part(file)), file.size) for file in self.files if there[file.name] != file.size
        )

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
        return "\n".join(lines)


def plan(source: Source, output_dir: Path, *, ignore_patterns: list[str] | None = None) -> Plan:
    """Returns what to fetch into `output_dir`; asks the Hub for its list of files, and writes nothing.

    `ignore_patterns` replaces the default choice of what to leave out (`unread`); an empty list leaves out nothing.

    Raises:
        Unreachable: No network, or an endpoint that does not answer as the Hub does.
        UserError: No such repository or revision, no access, another repository in `output_dir`.
    """
    folder = Path(output_dir).expanduser().absolute()
    _check_endpoint(source)
    _check_folder(folder, source)
    api = HfApi(endpoint=source.endpoint, token=source.token)
    try:
        where = {"repo_type": source.repo_type}
        commit = api.repo_info(source.repo_id, revision=source.revision, timeout=30, **where).sha
        # By commit: what is listed is what comes, also when somebody pushes meanwhile.
        listed = list(api.list_repo_tree(source.repo_id, recursive=True, revision=commit, **where))
    except (HFValidationError, *UNREACHABLE) as error:
        raise _explained(error, source) from error
    except NO_HUB as error:
        raise Unreachable(
            f"{source.host} does not answer as the Hub does ({type(error).__name__}: {_first_line(error)}); --endpoint "
            "and HF_ENDPOINT take the Hub or a mirror of it that speaks its protocol"
        ) from error
    files = [_file(entry) for entry in listed if isinstance(entry, RepoFile)]
    names = [file.name for file in files]
    if ignore_patterns is not None:
        left_out = set(names) - set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
    else:
        left_out = set(unread(names)) if source.repo_type == "model" else set()
    wanted = [file for file in files if file.name not in left_out]
    source = replace(source, revision=commit or source.revision)
    return Plan(source, folder, wanted, [f for f in files if f.name in left_out], ignore_patterns is None)


def fetch(planned: Plan) -> None:
    """Fetches what is not there, or there with other bytes, and checks it; on return the folder is complete.

    Raises:
        UserError: No access, no network, no space, no right to write, bytes that are not those that the repository
            states, a shard that an index names and the repository does not hold. What has arrived stays.
    """
    try:
        with _alone(planned.folder):
            missing = _missing_files(planned)
            _check_space(planned)
            with _bar("Fetching", planned.missing()) as update:
                indexes = [file for file in missing if file.name in INDEX_FILES]
                for index in indexes:  # before the weights: what is not whole in the repository is told at once
                    _fetch_file(planned, index, update)
                _check_index(planned)
                others = [file for file in missing if file not in indexes]
                _in_threads(lambda file: _fetch_file(planned, file, update), others)
            shutil.rmtree(planned.folder / BOOKKEEPING / "parts", ignore_errors=True)
            record = _record(planned.folder, planned.source)
            record.write_text(json.dumps({"repo_id": planned.source.repo_id}, indent=4))
    except (HFValidationError, *UNREACHABLE) as error:
        raise _explained(error, planned.source, planned.folder) from error


def read_json(planned: Plan, name: str) -> dict | None:
    """Returns a small file's content without writing it: from the folder, else from the Hub; None if there is none.

    Raises:
        UserError: It cannot be fetched or is no JSON.
    """
    file = next((file for file in planned.files if file.name == name), None)
    if file is None:
        return None
    try:
        if (planned.folder / name).is_file():
            return json.loads((planned.folder / name).read_bytes())
        content = io.BytesIO()
        url, headers = _address(planned.source, name)
        http_get(url, content, headers=headers, expected_size=file.size, tqdm_class=_relay(lambda count: None))
        return json.loads(content.getvalue())
    except UNREACHABLE as error:
        raise _explained(error, planned.source, planned.folder) from error
    except ValueError as error:
        raise UserError(f"{planned.source.repo_id}: {name} is no JSON: {error}") from error


def unread(files: list[str]) -> list[str]:
    """Returns those of a model's files that DPO does not read.

    Weights for other frameworks always; .bin, .pth and further safetensors only beside the model's own safetensors,
    which are those in the root under the names that transformers saves.
    """
    patterns = OTHER_FRAMEWORKS
    if any(_is_own_weights(name) for name in files):
        patterns += OTHER_WEIGHTS
    return [name for name in files if not _is_own_weights(name) and any(fnmatch(name, p) for p in patterns)]


def rules() -> str:
    """Says what `unread` leaves out, for when a repository's files are not known."""
    always, own, others = ", ".join(OTHER_FRAMEWORKS), " or ".join(OWN_WEIGHTS), ", ".join(OTHER_WEIGHTS)
    return f"{always}; where there are {own}, also other {others}"


def show_size(size: int) -> str:
    """Returns bytes for people: `512 B`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# Files


def _file(entry) -> File:
    """Returns a listed file; its name comes from outside and becomes a path here."""
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{entry.path}: a file of this name would lie outside of the folder; nothing was fetched")
    checksum = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
    is_checksum = len(checksum) == (64 if entry.lfs else 40) and set(checksum) <= set("0123456789abcdef")
    return File(entry.path, entry.lfs.size if entry.lfs else entry.size, checksum if is_checksum else "")


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


def _missing_files(planned: Plan) -> list[File]:
    """Returns the files that are to be fetched. Those that are there are read and checked; wrong ones are removed."""
    there = [file for file in planned.files if (planned.folder / file.name).is_file()]
    whole = set()
    with _bar("Checking", sum(file.size for file in there)) as update:
        _in_threads(lambda file: _is_whole(planned.folder / file.name, file, update) and whole.add(file), there)
    for file in there:
        if file not in whole:
            print(f"{planned.folder / file.name}: is not the repository's, or not whole; fetching it again")
            (planned.folder / file.name).unlink()
    return [file for file in planned.files if file not in whole]


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
        url, headers = _address(planned.source, file.name)
        with part.open("ab") as content:
            to = {"headers": headers, "expected_size": file.size, "tqdm_class": _relay(update)}
            http_get(url, content, resume_size=content.tell(), **to)  # asks for nothing where nothing is missing
        if _is_whole(part, file):
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


def _address(source: Source, name: str) -> tuple[str, dict[str, str]]:
    """Returns a file's URL and the headers to ask with: a token is for the endpoint and the Hub, not their stores."""
    url = hf_hub_url(
        source.repo_id, name, repo_type=source.repo_type, revision=source.revision, endpoint=source.endpoint
    )
    to = {"token": source.token, "endpoint": source.endpoint, "retry_on_errors": True}
    location = get_hf_file_metadata(url, **to).location
    trusted = {urlsplit(source.host).netloc, "huggingface.co"}
    token = source.token if urlsplit(location).netloc in trusted else False  # None: what `hf auth login` stored
    # Not compressed: what arrived is counted in the file's own bytes.
    return location, build_hf_headers(token=token) | {"Accept-Encoding": "identity"}


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


def _record(folder: Path, source: Source) -> Path:
    """Returns the file that says what a folder holds. Beside the files of a data set it would be read as rows."""
    return folder / REPO_ID_FILE if source.repo_type == "model" else folder / BOOKKEEPING / "dataset.json"


def _check_folder(folder: Path, source: Source) -> None:
    """Two models in one folder would be read as one: same default folder for models that differ only in owner."""
    for repo_type in ("model", "dataset"):
        record = _record(folder, replace(source, repo_type=repo_type))
        if not record.is_file():
            continue
        try:
            other = json.loads(record.read_text()).get("repo_id")
        except (ValueError, AttributeError):
            other = "something else"  # no record of ours
        if (other, repo_type) != (source.repo_id, source.repo_type):
            raise UserError(f"{folder} holds {other}; give {source.repo_id} a folder of its own with --output-dir")


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


def _check_space(planned: Plan) -> None:
    needed, free = planned.missing(), shutil.disk_usage(planned.folder).free
    if needed > free:
        raise UserError(_no_space(planned.folder, f"{show_size(needed)} needed, {show_size(free)} free"))


def _check_index(planned: Plan) -> None:
    """Every shard that an index names is in the repository; that those are here and whole is checked one by one."""
    known = {file.name for file in planned.files + planned.left_out}
    for name in {file.name for file in planned.files} & set(INDEX_FILES):
        try:
            shards = set(json.loads((planned.folder / name).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{planned.folder / name}: is no index of weights ({error}); take another --revision"
            ) from error
        if lost := sorted(shards - known):
            raise UserError(
                f"{planned.folder}: {name} names {', '.join(lost)}, which the repository does not hold: its upload is "
                "incomplete; take another --revision"
            )


# What went wrong


def _explained(error: Exception, source: Source, folder: Path | None = None) -> UserError:
    """Returns what went wrong and the way out, in one sentence or two. `folder` is None while the Hub is asked."""
    repo, host = source.repo_id, source.host
    login = "--hf-token TOKEN, or HF_TOKEN, or `hf auth login`"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return UserError(f"{repo}: a {source.kind} is named owner/name, as on {host}")
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
    if status == 401:
        return UserError(
            f"{repo}: {host} does not know your token ({_first_line(error)}), which may be mistyped, expired or "
            f"revoked; another one: {login}"
        )
    if status == 403:
        return UserError(
            f"{repo}: {host} forbids it to your token ({_first_line(error)}); allow it to read this repository at "
            f"{host}/settings/tokens, or give another one: {login}"
        )
    if status is not None:
        return UserError(f"{repo}: {host} answers with an error, try later: {_first_line(error)}")
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable(f"{repo}: HF_HUB_OFFLINE is set, so {host} is not asked; unset it to download")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(_no_space(folder, "the disk is full"))
    if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a connection
        return UserError(f"{folder}: cannot be written ({error}); another folder: --output-dir DIR")
    why = f"({type(error).__name__}: {_first_line(error)})"
    if folder is None:
        return Unreachable(
            f"{repo}: {host} cannot be reached {why}; check the network, or another host: --endpoint URL"
        )
    return UserError(
        f"{repo}: the connection to {host} broke off {why}; the same command again goes on where it stopped"
    )


def _no_space(folder: Path, why: str) -> str:
    return f"{folder}: {why}; another disk: --output-dir DIR"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
