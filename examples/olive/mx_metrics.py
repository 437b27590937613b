"""An evaluator for Olive: mxeval's figures beside Olive's own metrics, for rewritten models and any other.

Not a custom metric (`"type": "custom"`): Olive 0.13.0 cannot serialise a workflow that has one.
"""

from __future__ import annotations

from typing import Any

import mxrewrite
from olive.evaluator.metric_result import MetricResult, SubMetricResult
from olive.evaluator.olive_evaluator import OnnxEvaluator
from olive.evaluator.registry import Registry
from olive.hardware import Device
from olive.model import ONNXModelHandler


class MxEvaluator(OnnxEvaluator):
    """Perplexity and bits per byte by mxeval, then the metrics of the workflow (latency, ...) by Olive.

    Args:
        options: those of `mxrewrite.evaluate`: `data` and `tokenizer` above all (`type_args` in the workflow).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def evaluate(
        self, model: ONNXModelHandler, metrics: list, device: Device = Device.CPU, execution_providers: Any = None
    ) -> MetricResult:
        where = "cuda" if device == Device.GPU else "cpu"
        (record,) = mxrewrite.evaluate(model.model_path, device=where, **self.options).records
        if record["status"] != "ok":
            raise RuntimeError(f"{model.model_path}: mxeval: {record.get('reason', record['status'])}")
        results = {
            # The cross-entropy's exponential, and the information in a byte of text: smaller is better.
            f"mxeval-{name}": SubMetricResult(value=record[name], priority=-1, higher_is_better=False)
            for name in ("ppl", "bits_per_byte")
        }
        if metrics:
            results.update(super().evaluate(model, metrics, device, execution_providers).root)
        return MetricResult.model_validate(results)


# Olive reads a user script more than once.
if Registry.get("MxEvaluator") is None:
    Registry.register("MxEvaluator")(MxEvaluator)
