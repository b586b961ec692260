"""Adapters in PEFT's layout: peft_read.py reads them, peft_write.py writes them."""

from pairtune.config.layout import find_adapter as find_weights
from pairtune.folders.peft_read import read_adapter
from pairtune.folders.peft_write import write_adapter

__all__ = ["find_weights", "read_adapter", "write_adapter"]
