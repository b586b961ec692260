"""Fetches a model or a data set from the Hugging Face Hub: the same as `tune download`.

python tools/download.py Qwen/Qwen2.5-0.5B-Instruct --output-dir /tmp/Qwen2.5-0.5B-Instruct
"""

import sys

from pairtune.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
