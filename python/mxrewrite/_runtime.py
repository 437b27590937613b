"""The operator library in ONNX Runtime: where it is, how a session gets it, what a session runs.

onnxruntime is imported when it is needed: `import mxrewrite` stays fast, and planning, rewriting and numbers do
without it.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ._errors import MxError, RuntimeVersionError, UsageError
from ._models import PathLike

if TYPE_CHECKING:
    import onnxruntime as ort

OLDEST = (1, 22)
"""The oldest ONNX Runtime that the operators run in."""

Provider = Union[str, "tuple[str, Mapping[str, Any]]"]

# One session at a time is created here: what the library lists meanwhile is that session's.
_CREATING = threading.Lock()
_GROUPS: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MxNode:
    """A node of domain `mx` in a live session, as its kernel was made."""

    node: str
    op: str
    provider: str
    """`CPU` or `CUDA`."""
    kernel: str
    """On the CPU the instruction set and whether the weight was repacked; on a GPU the kind of kernel."""
    weight_format: str | None
    """None where the operator has no product, as `TokenScores`; B's for a product of two activations."""
    activation_format: str | None
    """`none` = weight-only."""
    block_size: int | None
    k: int | None
    n: int | None
    """Input and output features; None for a product of two activations, whose sizes are known when it runs."""
    raw: dict[str, Any] = field(repr=False, hash=False)
    """Everything that the library tells."""


def library_path() -> str:
    """The operator library, for `register_custom_ops_library` in any language.

    `MX_OPS_LIBRARY` in the environment names another one.
    """
    named = os.environ.get("MX_OPS_LIBRARY")
    path = Path(named) if named else Path(__file__).with_name("libmx_custom_ops.so")
    if not path.is_file():
        where = "named by MX_OPS_LIBRARY" if named else "of the package; install mxrewrite again"
        raise MxError(f"no operator library at {path}, {where}")
    return str(path.resolve())


def register(session_options: ort.SessionOptions) -> ort.SessionOptions:
    """Adds the operators to session options and returns them; options that have the operators already stay as they are.

    Raises:
        RuntimeVersionError: onnxruntime is older than 1.22.
    """
    _onnxruntime()
    session_options.register_custom_ops_library(library_path())
    return session_options


def session(
    path: PathLike | bytes,
    providers: Sequence[Provider] | None = None,
    sess_options: ort.SessionOptions | None = None,
    **kwargs: Any,
) -> ort.InferenceSession:
    """An `onnxruntime.InferenceSession` with the operators.

    Args:
        path: a rewritten model, or any other; or its bytes.
        providers: execution providers, as ONNX Runtime takes them (default: the CPU alone). With CUDA the libraries
            of the `nvidia-*` packages are loaded before, and MX nodes run there or the session fails: ONNX Runtime's
            retry on the CPU is off unless `enable_fallback` is given.
        sess_options: options to start from; the operators are added to them, and so is
            `session.qdq_matmulnbits_accuracy_level` 1 unless they have it: weight-only int8 files need it.
        kwargs: everything else that `InferenceSession` takes.

    Raises:
        RuntimeVersionError: onnxruntime is missing, older than 1.22, or has no CUDA where CUDA is named.
        Exceptions of ONNX Runtime, as they are.
    """
    ort = _onnxruntime()
    options = register(ort.SessionOptions() if sess_options is None else sess_options)
    # A weight-only int8 file (`lower="int8"`) would get its activations quantised, too.
    accuracy = "session.qdq_matmulnbits_accuracy_level"
    if not _has_entry(options, accuracy):
        options.add_session_config_entry(accuracy, "1")
    chosen = list(providers) if providers is not None else ["CPUExecutionProvider"]
    cuda = any(_name(provider) == "CUDAExecutionProvider" for provider in chosen)
    if cuda:
        # ONNX Runtime itself only warns, and runs on the CPU.
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise RuntimeVersionError(
                f"onnxruntime {ort.__version__} has no CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]' in its place"
            )
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        kwargs.setdefault("enable_fallback", 0)
    model = path if isinstance(path, bytes) else os.fspath(path)
    with _CREATING:
        before = {kernel["id"] for kernel in _kernels()}
        created = ort.InferenceSession(model, options, providers=chosen, **kwargs)
        # A provider whose libraries are missing is left out with a line of log and no exception.
        if cuda and not kwargs.get("enable_fallback") and "CUDAExecutionProvider" not in created.get_providers():
            raise MxError(
                "ONNX Runtime left out the CUDA provider, its log says why (CUDA, cuDNN or the driver is missing); "
                "enable_fallback=1 runs on the CPU"
            )
        # 0: a system that does not tell threads' numbers.
        here = (0, threading.get_native_id())
        made = [k for k in _kernels() if k["id"] not in before and k["thread"] in here]
        _GROUPS[created] = frozenset(kernel["session"] for kernel in made)
    return created


def describe(session: ort.InferenceSession) -> list[MxNode]:
    """What became of every MX node of a live session: provider, kernel and formats, in node order.

    Nodes are those that ONNX Runtime made kernels for, so nothing is guessed from the file: a node that fell back to
    the CPU says so. Sessions of `mxrewrite.session` are known; any other session is found by the names of its MX
    nodes, which takes a model that was loaded from a file.

    Raises:
        UsageError: a session that was made otherwise and cannot be told from another one.
    """
    with _CREATING:
        groups = _GROUPS.get(session)
        kernels = _kernels()
        # set_providers() makes a session anew, and other kernels with it.
        if groups is None or (groups and groups.isdisjoint(kernel["session"] for kernel in kernels)):
            groups = _matching(session, kernels)
    return [_node(kernel) for kernel in kernels if kernel["session"] in groups]


def _matching(session: ort.InferenceSession, kernels: list[dict[str, Any]]) -> frozenset[int]:
    """The group of kernels that a session of somebody else's making has."""
    claimed = frozenset[int]().union(*_GROUPS.values())
    expected = _mx_nodes(session)
    if not expected:
        return frozenset()
    names: dict[int, set[str]] = {}
    for kernel in kernels:
        names.setdefault(kernel["session"], set()).add(kernel["node"])
    found = [group for group, nodes in names.items() if nodes == expected and group not in claimed]
    views = {
        group: sorted(json.dumps(_told(kernel), sort_keys=True) for kernel in kernels if kernel["session"] == group)
        for group in found
    }
    if not found:
        raise UsageError("describe: no live MX kernels of this session; make it with mxrewrite.session")
    if any(view != views[found[0]] for view in views.values()):
        raise UsageError(
            f"describe: {len(found)} sessions of this model are alive and run it differently; "
            "make them with mxrewrite.session, which notes which is which"
        )
    return frozenset(found[:1])


def _told(kernel: dict[str, Any]) -> dict[str, Any]:
    """What is told of a kernel, without what names it."""
    return {key: value for key, value in kernel.items() if key not in ("id", "session", "thread")}


def _mx_nodes(session: ort.InferenceSession) -> set[str]:
    """Names of the MX nodes in the session's model."""
    path = getattr(session, "_model_path", None)
    if not path:
        raise UsageError("describe: this session's model has no file; make it with mxrewrite.session")
    from . import _native
    from ._errors import translated

    with translated():
        return set(_native.mx_nodes(os.fspath(path)))


def _node(kernel: dict[str, Any]) -> MxNode:
    return MxNode(
        node=kernel["node"],
        op=kernel["op"],
        provider=kernel["provider"],
        kernel=kernel["kernel"],
        weight_format=kernel["weight_format"],
        activation_format=kernel["activation_format"],
        block_size=kernel["block_size"],
        k=kernel["k"],
        n=kernel["n"],
        raw=kernel,
    )


@lru_cache(maxsize=None)
def _library(path: str) -> ctypes.CDLL:
    """The library that ONNX Runtime has loaded: the loader knows it by its path."""
    library = ctypes.CDLL(path)
    if not hasattr(library, "MxKernels"):
        raise MxError(f"{path} is older than this package and cannot list its kernels; use mxrewrite.library_path()")
    library.MxKernels.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.MxKernels.restype = ctypes.c_size_t
    return library


def _kernels() -> list[dict[str, Any]]:
    """All live MX kernels of the process, oldest first."""
    list_kernels = _library(library_path()).MxKernels
    size = list_kernels(None, 0)
    # Sessions of other threads may come and go between two calls.
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = list_kernels(buffer, size)
        if needed == 0:
            raise MxError("the operator library cannot list its kernels: an internal error, please report it")
        if needed <= size:
            kernels: list[dict[str, Any]] = json.loads(buffer.value.decode())
            return sorted(kernels, key=lambda kernel: kernel["id"])
        size = needed


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _has_entry(options: ort.SessionOptions, key: str) -> bool:
    try:
        options.get_session_config_entry(key)
    except Exception:  # ONNX Runtime's own type for a missing key differs between versions.
        return False
    return True


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeVersionError(f"onnxruntime cannot be imported ({error}): pip install 'onnxruntime>=1.22'") from error
    version = getattr(onnxruntime, "__version__", "")
    if _version(version) < OLDEST:
        where = getattr(onnxruntime, "__file__", "?")
        raise RuntimeVersionError(
            f"onnxruntime {version} ({where}) is too old for the MX operators: pip install 'onnxruntime>=1.22'"
        )
    return onnxruntime


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        # A build of somebody's own; the library itself checks what it runs in.
        return OLDEST
    return int(parts[0]), int(parts[1])
