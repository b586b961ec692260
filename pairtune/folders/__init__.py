"""A model's folder: weights in and out, the names that families give them, config.json, PEFT's adapters."""


def __getattr__(name: str):
    if name != "HFCheckpointer":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from pairtune.folders.hf_checkpointer import HFCheckpointer  # takes torch, which names of files do not

    return HFCheckpointer
