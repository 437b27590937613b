"""mxrewrite as a pass of Olive (https://github.com/microsoft/Olive), without a change to Olive.

`MxRewrite` is the pass. What it gives is an `MxONNXModel`: an ONNX model whose sessions have the MX operators, so that
Olive's own metrics (latency, throughput, accuracy) run it. Olive finds the pass through package_config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mxrewrite
from olive.common.ort_inference import check_and_normalize_provider_args, get_ort_available_providers
from olive.hardware import AcceleratorSpec, Device
from olive.model import ONNXModelHandler
from olive.model.config.registry import model_handler_registry
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam


@model_handler_registry("MxONNXModel")
class MxONNXModelHandler(ONNXModelHandler):
    """An ONNX model with MX operators.

    Olive registers no operator library of others in its sessions, so this handler makes the session. It takes the
    execution providers and session options that Olive would.
    """

    def prepare_session(
        self,
        inference_settings: dict[str, Any] | None = None,
        device: Device = Device.CPU,
        execution_providers: str | list[str] | None = None,
        rank: int | None = None,
    ):
        import onnxruntime as ort

        settings = self.merge_inference_settings(inference_settings, execution_providers)
        if not settings["execution_provider"]:
            cuda = device == Device.GPU and "CUDAExecutionProvider" in get_ort_available_providers()
            settings["execution_provider"] = ["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"]
            settings["provider_options"] = None
        providers, options = check_and_normalize_provider_args(
            settings["execution_provider"], settings.get("provider_options"), get_ort_available_providers()
        )
        return mxrewrite.session(
            self.model_path,
            providers=list(zip(providers, options)),
            sess_options=_session_options(ort, settings.get("session_options") or {}),
        )


def _session_options(ort: Any, given: dict[str, Any]) -> Any:
    """ONNX Runtime's session options from those of an Olive configuration."""
    options = ort.SessionOptions()
    for name, value in given.items():
        if value is None:
            continue
        if name == "extra_session_config":
            for key, entry in value.items():
                options.add_session_config_entry(key, entry)
        elif name == "execution_mode":
            options.execution_mode = [ort.ExecutionMode.ORT_SEQUENTIAL, ort.ExecutionMode.ORT_PARALLEL][value]
        elif name == "graph_optimization_level":
            options.graph_optimization_level = ort.GraphOptimizationLevel(value)
        elif hasattr(options, name):
            setattr(options, name, value)
        else:
            raise ValueError(f"session_options: ONNX Runtime has no session option '{name}'")
    return options


class MxRewrite(Pass):
    """Replaces Linear layers of an ONNX language model by MX operators with packed weights.

    Its parameters are those of `mxrewrite.rewrite`, of the same names and meanings.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def parameter(type_: Any, description: str) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=None, description=description)

        return {
            "tier": parameter(str, "a (MLP), b (MLP and attention; the default), c, d, all-linears."),
            "format": parameter(str, "Element format of weights (default fp8_e4m3)."),
            "activation_format": parameter(str, "That of activations (default: the weights'); none = weight-only."),
            "recipe": parameter(str, "A recipe in place of tier and formats: a TOML file, or a rewritten model."),
            "include": parameter(list[str], "Regular expressions that add layers to the tier."),
            "exclude": parameter(list[str], "Regular expressions that take layers away."),
            "block_size": parameter(int, "Values that share a scale (default 32)."),
            "base_dtype": parameter(str, "Float type of everything else: fp32, fp16 or bf16."),
            "threads": parameter(int, "Threads of the rewrite (default: all)."),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> MxONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            raise ValueError(f"MxRewrite takes an ONNX model, not {type(model).__name__}: put a conversion before it")
        # Cached passes share folders: the model gets one of its own, as it comes with a data file.
        output = Path(resolve_onnx_path(output_model_path, "model.onnx"))
        output.parent.mkdir(parents=True, exist_ok=True)
        given = {name: getattr(config, name) for name in self._default_config(self.accelerator_spec)}
        arguments = {name: value for name, value in given.items() if value is not None}
        report = mxrewrite.rewrite(model.model_path, output, **arguments)
        return MxONNXModelHandler(
            model_path=str(output.parent),
            onnx_file_name=output.name,
            inference_settings=model.inference_settings,
            model_attributes={
                **(model.model_attributes or {}),
                "mx": {"layers": report.sites, "bytes": report.bytes, "mxrewrite": mxrewrite.__version__},
            },
        )
