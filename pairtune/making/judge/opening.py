"""A judge, opened by what names it. What it needs of other packages is imported then."""

from pathlib import Path

from pairtune.errors import UserError
from pairtune.making.judge.endpoint import Asking, Endpoint
from pairtune.making.judge.function import WAYS, open_function
from pairtune.making.judge.question import Judge


def open_judge(name: str, asking: Asking | None = None) -> Judge:
    """Returns the judge that a name means: an endpoint's address, a reward model's folder, or a function's path.

    Args:
        asking: How an endpoint is asked; needed for one, and for nothing else.

    Raises:
        UserError: It means none, or cannot be one.
    """
    if "://" in name:
        if asking is None:
            raise UserError(f"--judge {name}: an endpoint is told which model judges: --judge-model NAME")
        return Endpoint(name, asking)
    if asking is not None:
        raise UserError(f"--judge {name}: is no endpoint's address, and --judge-model and --rubric are for one")
    if name.startswith("implicit:"):
        raise UserError(f"--judge {name}: reads a config; from Python it is pairtune.cli.implicit.ImplicitReward")
    if Path(name).expanduser().is_dir():
        from pairtune.making.judge.reward_model import RewardModel

        return RewardModel(Path(name).expanduser())
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise UserError(f"--judge {name}: there is no such folder; {WAYS}")
    return open_function(name)
