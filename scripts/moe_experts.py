"""Mixture-of-experts layers in a form that torch.onnx exports and mxrewrite can quantise.

transformers 5 keeps the experts of a layer as two stacked parameters, [E, 2I, H] and [E, H, I], and picks
rows by data-dependent or grouped products that neither exporter translates (its experts_implementation="batched_mm"
exports, as MatMuls that mxrewrite turns into MxExpertMatMul). Here each expert becomes three
Linear layers w1 (gate), w3 (up) and w2 (down), Mixtral's own names, and every expert sees every token: its
share is zero where the router did not choose it. The result is the same up to the order of additions; the
time is that of all experts, E / top_k times as much.
"""

import torch
from torch import nn


class Expert(nn.Module):
    """One expert's Linear layers; the weights share memory with the stacked parameters."""

    def __init__(self, gate_up, down, activation):
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self.w1, self.w3, self.w2 = linear(gate), linear(up), linear(down)
        self.activation = activation

    def forward(self, hidden_states):
        return self.w2(self.activation(self.w1(hidden_states)) * self.w3(hidden_states))


class DenseExperts(nn.ModuleList):
    """Stands in for a stacked experts module; the same arguments, the same result."""

    def __init__(self, stacked):
        pairs = zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
        super().__init__(Expert(gate_up, down, stacked.act_fn) for gate_up, down in pairs)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            chosen = (top_k_index == index).to(top_k_weights.dtype)
            share = (top_k_weights * chosen).sum(-1, keepdim=True)
            total = total + (expert(hidden_states) * share).to(total.dtype)
        return total


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def is_stacked(module):
    """Whether `module` is a plain gated experts module: no biases, [out, in] order, an ordinary gate."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights)
        and hasattr(module, "act_fn")
        and not getattr(module, "has_bias", False)
        and not getattr(module, "is_transposed", False)
        and getattr(type(module), "_apply_gate", None) in (None, default_gate())
    )


def default_gate():
    try:
        from transformers.integrations.moe import _default_apply_gate
    except ImportError:
        return None
    return _default_apply_gate


def unstack_experts(model):
    """Replaces every stacked experts module of `model` in place; returns how many."""
    found = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if is_stacked(child)
    ]
    for parent, name in found:
        setattr(parent, name, DenseExperts(getattr(parent, name)))
    return len(found)
