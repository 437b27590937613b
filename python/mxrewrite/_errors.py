"""Exceptions. Messages are one line: the thing, the cause and what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from . import _native


class MxError(Exception):
    """Whatever goes wrong in mxrewrite."""


class UsageError(MxError, ValueError):
    """Arguments that are unknown or contradict each other."""


class ModelError(MxError):
    """A model, weight or checkpoint that cannot be read, rewritten or written. No output is left then."""


class NothingToReplaceError(ModelError):
    """The selection takes no layer of the model.

    `candidates` are the layers that were found, each a dict of `node`, `op` and `reason` (why it is left alone).
    """

    def __init__(self, message: str, candidates: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.candidates = candidates

    def __reduce__(self) -> tuple[type, tuple[str, list[dict[str, str]]]]:
        return type(self), (str(self), self.candidates)


class RuntimeVersionError(MxError, ImportError):
    """No onnxruntime, or one that is too old."""


class EvaluationError(MxError):
    """`mxeval` failed. `returncode` is its exit code, `stderr` what it said."""

    def __init__(self, message: str, returncode: int, stderr: str) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stderr = stderr

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (str(self), self.returncode, self.stderr)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns errors of the extension module into the ones above."""
    try:
        yield
    except _native.NativeError as error:
        kind, message, details = error.args
        if kind == "usage":
            raise UsageError(message) from None
        if kind == "nothing":
            raise NothingToReplaceError(message, json.loads(details)) from None
        raise ModelError(message) from None
