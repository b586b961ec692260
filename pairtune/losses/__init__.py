"""Preference losses: formulas, modules in torchtune's calling convention, and how they are called."""
