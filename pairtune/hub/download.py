"""Fetches a model or a data set from the Hugging Face Hub, or a mirror that speaks its protocol, into a folder.

Of a model only what training reads (choice.py). What has arrived stays: huggingface_hub's own downloads start a file
that broke off anew, so files come through its `http_get`, which goes on at the byte where a file ended, and get their
names when their checksums are the repository's. Requests and their errors are in http.py. Nothing here imports torch.
"""

import hashlib
import io
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock

from pairtune.config.layout import INDEX_FILES, REPO_ID_FILE
from pairtune.errors import UserError
from pairtune.files import parse_object, read_object, write_text
from pairtune.hub.http import UNREACHABLE, File, explained, get, no_space
from pairtune.hub.plan import Plan, in_the_way, show_size, size_of
from pairtune.hub.record import ANOTHER, BOOKKEEPING, note, write_record
from pairtune.process.console import Progress

THREADS = 8  # files at a time
LARGEST = 50 * 10**9  # bytes; above that the Hub serves a file through Xet only


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
                write_text(planned.folder / REPO_ID_FILE, json.dumps(origin, indent=4))
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
        raise in_the_way(planned, own)
    missing = [file for file in planned.files if file not in whole]
    _check_space(planned, missing, leaving=wrong + stale)
    for file in wrong:
        print(f"{planned.folder / file.name}: is not the repository's, or not whole; fetching it again")
    for file in wrong + stale:
        (planned.folder / file.name).unlink()
    kept = [file for file in planned.files if file in whole and file.name in fetched]
    kept += [file for file in planned.left_out if file in planned.fetched]
    write_record(planned.folder, planned.source, kept)
    return missing


def _check_space(planned: Plan, missing: list[File], leaving: list[File]) -> None:
    needed = planned.to_come(missing)
    free = shutil.disk_usage(planned.folder).free + sum(size_of(planned.folder / file.name) for file in leaving)
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
        if size_of(part) > file.size:  # an endpoint that sent more than it stated
            part.unlink()
        with part.open("ab") as content:
            get(planned.source, file, content, update)
        if _is_whole(part, file):
            note(planned.folder, file)  # before it is there, so that it never is a file of unknown origin
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


# Progress


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes there were; yields what counts them, from any thread."""
    if not total:
        yield lambda count: None
        return
    with Progress(what, total, in_bytes=True, stays=True) as progress:
        yield progress.update


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
