"""Direct Preference Optimization recipes on torchtune. The recipes hold the loop; this package holds the leaves."""

__version__ = "0.1.0"
