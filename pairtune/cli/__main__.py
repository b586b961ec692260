"""python -m pairtune.cli: the same as `tune`."""

import sys

from pairtune.cli.commands import main

sys.exit(main())
