"""An environment with the newest TRL, which bench.py makes where there is none, and what is installed in it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("trl", "transformers", "peft", "accelerate", "liger-kernel")
MADE = "made.json"  # written last: an environment without it is made anew


def python_of(folder: Path, say=print) -> str:
    """Returns the Python of a virtual environment, made there if need be: TRL as pip finds it, with this one's torch.

    Liger's kernels are left out where they do not install.

    Raises:
        SystemExit: pip fails; its last line is told.
    """
    python, made = folder.absolute() / "bin" / "python", folder / MADE
    if not made.is_file():
        say(f"making {folder}: TRL and what it needs, by pip")
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        torch = f"torch=={version('torch').partition('+')[0]}"  # a step's speed is to be TRL's, not torch's
        run(python, "-m", "pip", "install", torch, "numpy", "--upgrade", "trl", "peft")
        liger = subprocess.run(
            [python, "-m", "pip", "install", torch, "liger-kernel"], capture_output=True, check=False
        )
        if liger.returncode:
            say("liger-kernel does not install here")
        made.write_text(json.dumps(_installed(python)))
    return str(python)


def versions_of(folder: Path) -> str:
    """Returns what is installed in an environment that `python_of` has made, in words."""
    return ", ".join(f"{name} {number}" for name, number in json.loads((folder / MADE).read_text()).items())


def _installed(python: Path) -> dict[str, str]:
    told = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    numbers = {package["name"].lower().replace("_", "-"): package["version"] for package in told}
    return {name: numbers[name] for name in ("torch", *PACKAGES) if name in numbers}


def run(*command: str | Path, **how) -> str:
    """Returns what a command prints.

    Args:
        how: Of subprocess.run.

    Raises:
        SystemExit: It fails; its last line is told.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SystemExit(f"{' '.join(map(str, command))}: {said[-1] if said else done.returncode}")
    return done.stdout
