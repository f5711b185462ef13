"""Sphinx configuration: ``sphinx-build -W docs build/docs`` (extra ``docs``)."""

project = "gemma4_jax"
author = "the gemma4_jax authors"
copyright = author

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures.py", "notebooks/*.py", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "gemma4_jax"
templates_path = []

nb_execution_mode = "off"  # the tests run the notebooks
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
