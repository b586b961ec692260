"""`tune push`: a model's folder, or a run's export, to the Hugging Face Hub."""

from pathlib import Path

from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.run.places import CONFIG, EXPORT, LOG


def push(argv: list[str]) -> int:
    """Upload a model's folder, of a run's its export, with its card to the Hugging Face Hub.

    Files and their sizes are told first; hidden ones stay here. The repository is made where it is missing.
    """
    parser = parser_of(push)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model's or adapter's; of a run's, its export")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    parser.add_argument(
        "--private", action="store_true", help="nobody else sees it; refused where it is public already"
    )
    parser.add_argument("--revision", help="a branch, which is made where it is missing; default: main")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    parser.add_argument("--hf-token", metavar="TOKEN", help="default: HF_TOKEN, else `hf auth login`")
    parser.add_argument("--endpoint", metavar="URL", help="default: HF_ENDPOINT, else the Hub")
    args = parser.parse_args(argv)
    from pairtune.hub.http import Source
    from pairtune.hub.upload import plan_upload, upload

    source = Source(args.repo_id, "model", args.revision, args.endpoint, args.hf_token)
    planned = plan_upload(_model_in(args.folder.expanduser()), source, is_private=args.private)
    print(planned, flush=True)
    if not args.dry_run:
        print(f"\n{upload(planned)} has all of it")
    return 0


def _model_in(folder: Path) -> Path:
    """A run's export, or the folder itself."""
    if not ((folder / CONFIG).is_file() and (folder / LOG).is_file()):
        return folder
    if not (folder / EXPORT).is_dir():
        raise UserError(f"{folder}: this run has exported nothing yet; let it end, or resume it with resume=true")
    return folder / EXPORT
