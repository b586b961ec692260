"""Preference losses: classes in torchtune's calling convention, how they are called, and published settings."""

from pairtune.losses.modules import *  # noqa: F403  (every loss that has a name: pairtune.losses.Ipo)
