"""The measured sides of ``experiments.benchmark``: one module a mode."""
