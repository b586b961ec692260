"""For every test: torchtune finds what it needs of torchao, whichever a test imports first."""

import pairtune  # noqa: F401
