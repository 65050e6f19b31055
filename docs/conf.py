"""Sphinx settings: Markdown pages through MyST, the reference from the docstrings."""

from importlib import metadata

project = "gpusaver"
author = "the gpusaver authors"
release = metadata.version("gpusaver")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_mock_imports = ["torch"]

html_theme = "pydata_sphinx_theme"
html_title = f"gpusaver {release}"
html_show_sourcelink = False
html_theme_options = {"show_prev_next": False}
