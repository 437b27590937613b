"""`python -m mxrewrite` is the command `mxrewrite`."""

from ._commands import mxrewrite

mxrewrite()
