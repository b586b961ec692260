"""A model's folder to the Hugging Face Hub, by huggingface_hub's own upload; what it takes is told before. No torch."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from pairtune.config.layout import ADAPTER_FILES, find_adapter, find_weights
from pairtune.errors import UserError
from pairtune.hub.http import UNREACHABLE, Source, explained, first_line, list_files

CARD = "README.md"
HIDDEN = (".*", "*/.*")  # patterns of what stays here


@dataclass(frozen=True)
class Upload:
    """What goes where: files by their names in `folder`, with bytes; `is_private` for a repository that is made."""

    source: Source
    folder: Path
    files: dict[str, int]
    is_private: bool

    def __str__(self) -> str:
        seen = "private" if self.is_private else "public, unless it exists and is private"
        lines = [f"{self.folder} to {self.source}, {seen}:"]
        width = max(map(len, self.files))
        lines += [f"  {name:<{width}}  {size:>17,} bytes" for name, size in self.files.items()]
        lines.append(f"  {'together':<{width}}  {sum(self.files.values()):>17,} bytes in {len(self.files)} files")
        if CARD not in self.files:
            lines.append(f"without a {CARD}: the Hub will show a model without a card")
        return "\n".join(lines)


def plan_upload(folder: Path, source: Source, *, is_private: bool) -> Upload:
    """Returns what an upload of a model's folder, or an adapter's, is made of; nothing is sent.

    Raises:
        UserError: It is no model's folder, or one whose index names files that are not there.
    """
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        find_adapter(folder, key="FOLDER")
    else:
        find_weights(str(folder), key="FOLDER")
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder): path.stat().st_size for path in found}
    files = {str(name): size for name, size in names.items() if not any(part.startswith(".") for part in name.parts)}
    return Upload(source, folder, files, is_private)


def upload(planned: Upload) -> str:
    """Makes the repository where it is missing, uploads, and compares what is there then; returns its address.

    Raises:
        UserError: The Hub refuses it, or cannot be reached, or a repository that was to be private is not.
    """
    token = planned.source.sent_token()
    if not token:
        raise UserError("push: needs a token that may write: --hf-token TOKEN, or HF_TOKEN, or `hf auth login`")
    try:
        return _upload(planned, HfApi(endpoint=planned.source.host, token=token))
    except (HFValidationError, OfflineModeIsEnabled, *UNREACHABLE) as error:
        raise _explained(error, planned.source) from error
    except ValueError as error:  # a card whose metadata the Hub refuses, a file that its store refuses
        raise UserError(f"{planned.source.repo_id}: not uploaded: {first_line(error, planned.source)}") from error


def _upload(planned: Upload, api: HfApi) -> str:
    source = planned.source
    made = api.create_repo(source.repo_id, private=planned.is_private or None, exist_ok=True)
    if planned.is_private and api.repo_info(made.repo_id).private is False:
        raise UserError(
            f"{made.repo_id}: exists and is public, and --private was given; nothing was uploaded: make it private at "
            f"{source.page}/settings, or name another repository"
        )
    if source.revision:
        api.create_branch(made.repo_id, branch=source.revision, exist_ok=True)
    if not _has_xet(source, made.repo_id, api.token):
        constants.HF_HUB_DISABLE_XET = True  # else the client asks for it again and again; LFS's store does
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=planned.folder,
        revision=source.revision,
        commit_message="Upload a model by pairtune",
        ignore_patterns=list(HIDDEN),
    )
    sizes = {file.name: file.size for file in list_files(source)}
    if wrong := [name for name, size in planned.files.items() if sizes.get(name) != size]:
        raise UserError(
            f"{made.repo_id}: {', '.join(wrong)}: not there, or not as long as here, after the upload; look at "
            f"{source.page}: its .gitignore may leave files out; then the same command again"
        )
    return source.page


def _has_xet(source: Source, repo_id: str, token: str) -> bool:
    """Whether large files go to the Hub's newer store, which not every mirror has."""
    url = f"{source.host}/api/models/{repo_id}/xet-write-token/{quote(source.revision or 'main', safe='')}"
    return get_session().get(url, headers=build_hf_headers(token=token), timeout=30).status_code not in (404, 405, 501)


def _explained(error: Exception, source: Source) -> UserError:
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 403:
        said = first_line(error, source)
        return UserError(
            f"{source.repo_id}: {source.host} forbids it to your token ({said}); allow it to write there at "
            f"{source.host}/settings/tokens, or give another one: --hf-token TOKEN"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{source.repo_id}: HF_HUB_OFFLINE is set, so {source.host} is not asked; unset it to upload")
    return explained(error, source)
