"""transformers' causal language models behind the face of torchtune's: for the families that torchtune lacks.

`causal_lm` is named in a config as pairtune.models.bridge.causal_lm. transformers is an optional dependency, the extra
pairtune[models], and is imported when a model is built.

- build: from a folder's config.json to a model on the meta device; no code of the folder is run
- decoder: its face
- visible: prompt sharing, by functions that transformers calls for masks and attention
- towers: what it has for images and sound, which pairs of texts leave as it is
- roles: which of its linear layers lora.modules means
- files: how a folder names its weights, read and written by transformers' own conversions
"""

from pairtune.models.bridge.build import causal_lm
from pairtune.models.bridge.decoder import BridgedDecoder

__all__ = ["BridgedDecoder", "causal_lm"]
