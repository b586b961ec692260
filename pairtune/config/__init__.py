"""A run's config: from defaults, YAML and key=value to checked values, and the components that it names."""

from pairtune.config.components import instantiate
from pairtune.config.layers import METHODS, check, load, notes, parse
from pairtune.config.named_paths import paths
from pairtune.config.rules import REQUIRED
from pairtune.config.saved import save

__all__ = ["METHODS", "REQUIRED", "check", "instantiate", "load", "notes", "parse", "paths", "save"]
