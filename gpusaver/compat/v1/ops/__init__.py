"""The rows of the table of ops, by subject.  Importing this fills :data:`gpusaver.compat.v1.table.TABLE`."""

from gpusaver.compat.v1.ops import arrays, joining, math, nn, random, reductions, saving, slicing, state

__all__ = ["arrays", "joining", "math", "nn", "random", "reductions", "saving", "slicing", "state"]
