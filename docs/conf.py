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

# A reference in a docstring that leads nowhere is a warning, and so an error. Signatures may name types of Python and
# NumPy, and those of gpusaver that are no part of its surface.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|concurrent|np|numpy|os|random|re)\..*"),
    ("py:class", r"gpusaver\.(bundle|device|pipeline|protos|reader|saver|saving|storage)\..*"),
    ("py:class", "CheckpointState|MetaGraphDef|Mode|PathLike|SaverDef|Storage|Timeline|WhenDiskFull"),
]
