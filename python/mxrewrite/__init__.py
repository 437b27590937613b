"""Quantise ONNX language models to OCP Microscaling (MX) formats, run them in stock ONNX Runtime, and measure
what it costs.

>>> import mxrewrite
>>> report = mxrewrite.rewrite("model.onnx", tier="a", format="fp8_e4m3")
>>> session = mxrewrite.session(report.output)

Models: `plan`, `rewrite`. Running them: `library_path`, `register`, `session`, `describe`. Numbers:
`quantize`, `dequantize`. Measuring: `evaluate`. Everything raises `MxError` or a subclass of it.
"""

from ._errors import EvaluationError, ModelError, MxError, NothingToReplaceError, RuntimeVersionError, UsageError
from ._evaluate import Evaluation, evaluate
from ._models import Plan, Report, Site, Skipped, plan, rewrite
from ._native import version as _version
from ._numbers import FORMATS, Quantized, dequantize, quantize
from ._runtime import MxNode, describe, library_path, register, session

__version__ = _version()

__all__ = [
    "FORMATS",
    "Evaluation",
    "EvaluationError",
    "ModelError",
    "MxError",
    "MxNode",
    "NothingToReplaceError",
    "Plan",
    "Quantized",
    "Report",
    "RuntimeVersionError",
    "Site",
    "Skipped",
    "UsageError",
    "__version__",
    "dequantize",
    "describe",
    "evaluate",
    "library_path",
    "plan",
    "quantize",
    "register",
    "rewrite",
    "session",
]
