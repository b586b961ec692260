"""torchtune 0.6.1 on a torchao that is newer than it: names that have moved or gone are known while it is imported.

`import pairtune` is enough, where it comes before torchtune's import; it imports neither torch nor torchao, in which
nothing stays changed.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version

from pairtune.errors import UserError

FIRST, LAST = (0, 15), (0, 18)  # releases of torchao that the tests ran on; docs/versions.md
WAY_OUT = f"known to work: torchao {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}; pip install 'torchao<0.{LAST[1] + 1}'"

# Modules of torchao that torchtune imports, and where they are now
MOVED = {"torchao.dtypes.nf4tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"}

# What torchtune.training.quantization imports. Its quantizers alone use it, which make a model small after training.
QUANTIZERS = {
    "torchao.dtypes": ("TensorCoreTiledLayout",),
    "torchao.quantization": ("int4_weight_only", "int8_dynamic_activation_int4_weight"),
}

# Beginnings of what torchao has logged at import: kernels that were built for other machines or another torch, none of
# which training in NF4 or with its optimizers uses, and a way of writing that torch will refuse of torchao one day.
NOISE = {
    "torchao": ("Skipping import of cpp extensions due to incompatible torch version", "Failed to load "),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
}


class TorchaoError(UserError, ImportError):
    """torchao lacks what torchtune needs of it."""


class Moved(MetaPathFinder, Loader):
    """Imports a module from where it is now; it is the same module under both names. Last of sys.meta_path."""

    def __init__(self, moved: dict[str, str]):
        self.moved = moved

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.moved else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.moved[module.__name__])


class Around(MetaPathFinder):
    """Has a module executed within a context. First of sys.meta_path."""

    def __init__(self, contexts: dict[str, Callable[[], AbstractContextManager]]):
        self.contexts = contexts

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.contexts:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def within(module) -> None:
                with self.contexts[name]():
                    execute(module)

            spec.loader.exec_module = within  # of this spec's own loader
        return spec


@contextmanager
def named_if_unknown() -> Iterator[None]:
    """Within it, an import that fails beside a torchao that is not known raises TorchaoError, which names it."""
    try:
        import torchao  # noqa: F401  torchtune would say of any failure that torchao is not installed

        yield
    except TorchaoError:
        raise
    except Exception as error:
        elsewhere = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "torchao"
        if elsewhere or _is_known():
            raise
        lacks = (str(error) or repr(error)).strip().splitlines()[0]
        message = f"torchao {version('torchao')} cannot be imported beside torchtune 0.6.1: {lacks}; {WAY_OUT}"
        raise TorchaoError(message) from error


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it, names of QUANTIZERS that torchao no longer has are functions that raise TorchaoError when called."""
    added = []
    for place, names in QUANTIZERS.items():
        module = importlib.import_module(place)
        for name in names:
            if not hasattr(module, name):
                setattr(module, name, _stand_in(f"{place}.{name}"))
                added.append((module, name))
    try:
        yield
    finally:
        for module, name in added:  # others ask torchao whether it has them
            delattr(module, name)


def install() -> None:
    """Has torchtune, whenever it is imported, find what it needs of torchao; raises TorchaoError then if it cannot."""
    sys.meta_path.insert(0, Around({"torchtune": named_if_unknown, "torchtune.training.quantization": stand_ins}))
    sys.meta_path.append(Moved(MOVED))


# Of torch 2.13: torchtune's norms compute in float32 with weights in bf16, as they are meant to.
WARNED = "Mismatch dtype between input and weight"


def quiet() -> None:
    """Drops lines of NOISE from what torchao and torch log, and what torch warns of that is as it should be."""
    warnings.filterwarnings("ignore", WARNED)
    for name, beginnings in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, all=beginnings: not str(record.msg).startswith(all))


def _is_known() -> bool:
    try:
        return FIRST <= tuple(map(int, version("torchao").split(".")[:2])) <= LAST
    except ValueError:  # a build of one's own
        return False


def _stand_in(name: str) -> Callable:
    def gone(*args, **kwargs):
        raise TorchaoError(
            f"{name}: torchao {version('torchao')} no longer has it, and torchtune's quantizers need it; "
            "pip install 'torchao==0.15.*' to use them"
        )

    return gone
