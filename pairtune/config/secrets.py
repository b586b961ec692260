"""Secrets have no place in a config: a run prints it, writes it to config.yaml and hands it to its logger."""

import re
from typing import Any

from pairtune.errors import UserError

_NAMES = re.compile(  # not eos_token and its like
    r"(.*_)?(api_?key|access_?key|secret|secret_key|password|passwd|credentials?)"
    r"|((hf|hub|auth|access|api)_)?token",
    re.I,
)
_VALUES = (
    re.compile(r"://[^/\s@]+:[^/\s@]+@"),  # a URL with a password
    re.compile(r"[?&]\w*(token|key|secret|password|signature)=[^&\s]", re.I),
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\$\{oc\.env:\s*\w*(token|key|secret|password)", re.I),
)


def check_secrets(node: Any, where: str, name: str = "") -> None:
    """Refuses keys and values that look like secrets; the message does not show them.

    Args:
        node: Nested dicts and lists, before ${...} is resolved.
        where: The file, or the command line.
        name: The node's own key.

    Raises:
        UserError: With the variables of the environment that do instead.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            check_secrets(value, where, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            check_secrets(value, where, name)
    elif node is not None and (
        _NAMES.fullmatch(name.rpartition(".")[2]) or any(pattern.search(str(node)) for pattern in _VALUES)
    ):
        raise UserError(
            f"{where}: {name}: looks like a secret, and a run writes its config to config.yaml; take it out, and set "
            "HF_TOKEN, WANDB_API_KEY or COMET_API_KEY in the environment, where the libraries look for it; what a URL "
            "with a password names, download first"
        )
