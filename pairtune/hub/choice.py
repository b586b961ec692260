"""Which files of a model's repository training reads: it often holds the weights two or three times over."""

from fnmatch import fnmatch

from pairtune.config.layout import ADAPTER_FILES, MODEL_FILES

OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel")
# Weights a second time, where safetensors exist. Not all of original/: Llama 3's tokenizer.model is only there.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.safetensors")
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model-*-of-*.safetensors")
# What the training of the repository's model left behind: intermediate checkpoints, and what it would resume from.
TRAINING_STATES = ("checkpoint[-_][0-9]*/*", "*/checkpoint[-_][0-9]*/*", "global_step[0-9]*/*", "trainer_state.json")
TRAINING_STATES += ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")


def unread(files: list[str]) -> list[str]:
    """Returns those of a model's files that DPO does not read.

    Weights for other frameworks always; .bin, .pth and further safetensors only beside the model's own safetensors,
    which are those in the root under the names that transformers saves; what its training left behind only where the
    root holds a model or an adapter.
    """
    patterns = OTHER_FRAMEWORKS
    if any(_is_own_weights(name) for name in files):
        patterns += OTHER_WEIGHTS
    if any(_is_own_weights(name) or name in MODEL_FILES + ADAPTER_FILES for name in files):
        patterns += TRAINING_STATES
    if ADAPTER_FILES[0] in files:
        patterns += ADAPTER_FILES[1:]
    return [name for name in files if not _is_own_weights(name) and any(fnmatch(name, p) for p in patterns)]


def rules() -> str:
    """Says what `unread` leaves out, for when a repository's files are not known."""
    always, own, others = ", ".join(OTHER_FRAMEWORKS), " or ".join(OWN_WEIGHTS), ", ".join(OTHER_WEIGHTS)
    states = ", ".join(TRAINING_STATES)
    return f"{always}; beside weights of its own {states}; where there are {own}, also other {others}"


def _is_own_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in OWN_WEIGHTS)
