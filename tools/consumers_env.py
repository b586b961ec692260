"""Environments of programs that read exports, which check_consumers.py makes where there are none."""

import json
import os
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from trl_env import run

MADE = "made.json"  # written last: an environment without it is made anew
CONVERTER = "vendor/llama.cpp/convert_hf_to_gguf.py"  # in llama-cpp-python's source package
# What the converter and its tokenizers import; torch as it is here, which keeps a second download away.
CONVERTERS = ("numpy", "transformers>=5", "sentencepiece", "protobuf", "pyyaml")
# Without what no checking needs, and for one CPU: it takes minutes, a job at a time.
CMAKE = "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O1"


def llama_cpp(folder: Path, say=print) -> tuple[Path, Path]:
    """Returns the Python of an environment with llama-cpp-python, made there if need be, and llama.cpp's converter.

    Raises:
        SystemExit: pip or the compiler fails; the last line is told.
    """
    python = folder.absolute() / "bin" / "python"
    if not (folder / MADE).is_file():
        say(f"making {folder}: llama-cpp-python from its source, which is compiled: minutes")
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        torch = f"torch=={version('torch').partition('+')[0]}"
        run(python, "-m", "pip", "install", torch, *CONVERTERS)
        sources = folder / "sources"
        run(*(python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", sources, "llama-cpp-python"))
        (package,) = sources.glob("*.tar.gz")
        with tarfile.open(package) as file:
            file.extractall(sources, filter="data")
        how = {"CMAKE_ARGS": CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": "1"} | os.environ
        run(python, "-m", "pip", "install", str(package), env=how)
        (folder / MADE).write_text(json.dumps({"package": package.name.removesuffix(".tar.gz")}))
    name = json.loads((folder / MADE).read_text())["package"]
    return python, folder.absolute() / "sources" / name / CONVERTER


def vllm(folder: Path, say=print) -> Path:
    """Returns the Python of an environment with vLLM, made there if need be: several GB.

    Raises:
        SystemExit: There is no GPU, or pip fails.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("its wheels are for GPUs, and none is here")
    python = folder.absolute() / "bin" / "python"
    if not (folder / MADE).is_file():
        say(f"making {folder}: vLLM and what it needs, by pip")
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        run(python, "-m", "pip", "install", "vllm")
        (folder / MADE).write_text("{}")
    return python


def ask(python: Path, **asked) -> dict:
    """Returns what consumer_worker.py answers in an environment.

    Raises:
        SystemExit: It fails; its last line is told.
    """
    worker = Path(__file__).with_name("consumer_worker.py")
    return json.loads(run(python, str(worker), input=json.dumps(asked)).splitlines()[-1])


def convert(python: Path, converter: Path, export: Path, target: Path, kind: str) -> None:
    """Writes an export as a GGUF file of a kind, f32 or q8_0, by llama.cpp's converter.

    Raises:
        SystemExit: It refuses; its last line is told.
    """
    run(python, str(converter), str(export), "--outfile", str(target), "--outtype", kind)
