"""Rows of behaviour that gpusaver and TensorFlow share, and the little language they are written in."""

from __future__ import annotations

from tables import meta_graph_rows, retention_rows, saver_rows, state_rows

ROWS = [*saver_rows.ROWS, *retention_rows.ROWS, *state_rows.ROWS, *meta_graph_rows.ROWS]
