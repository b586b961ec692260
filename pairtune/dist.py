"""The processes of a run and the device that this one computes on."""

from dataclasses import dataclass

import torch

from pairtune.errors import UserError


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1


def start(device: str) -> World:
    """Returns a world of one process on `device`: cpu, cuda, cuda:N, or auto (a GPU where there is one).

    Raises:
        UserError: A GPU that this machine or this build of PyTorch does not have.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if found else "cpu"
    index = int(device[5:]) if device.startswith("cuda:") else 0
    if device.startswith("cuda") and index >= found:
        build = "" if torch.version.cuda else f" and PyTorch {torch.__version__} is built without CUDA"
        raise UserError(f"device={device}: {found} GPUs are visible{build}; nearest valid: device=cpu")
    return World(torch.device(f"cuda:{index}" if device.startswith("cuda") else "cpu"))
