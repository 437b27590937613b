#!/usr/bin/env bash
# Measures decoding on a GPU: a model of Llama 3.1 8B's shape with random weights in bfloat16 and a KV cache, and the same
# rewritten to MX. scripts/pack_gpu.sh has put the programs into .gpu/ before; neither Rust nor a network is needed.
#
#   scripts/gpu_generate.sh [PART...]      default: model plain graph
#
#   model     writes the model (16 GB) and its rewritten folders (fp8 9 GB, fp4 5.5 GB each) to MX_GENERATE
#   plain     examples/generate.py --benchmark: IoBinding, past and present in one buffer; tokens a second, ratios to bf16
#   graph     the same with decoding as a CUDA graph
#   genai     scripts/genai_run.py: ONNX Runtime GenAI (pip install onnxruntime-genai-cuda beside onnxruntime-gpu)
#   genai-graph  the same with decoding as a CUDA graph
#
#   MX_PYTHON             (default python3) with numpy, onnx and onnxruntime-gpu
#   MX_GENERATE           folder, 50 GB for all variants (default /dev/shm/mx_generate); what is there is kept
#   MX_GENERATE_OPTIONS   more options of scripts/gpu_generate.py (--variants fp4,fp8 --tokens 128 --shape tiny --device cpu)
# Logs and records go to MX_GPU_LOGS (default .gpu/logs). Exit code 0: every part ran and the bars were kept.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_env.sh"
need_programs mxrewrite libmx_custom_ops.so
export PYTHONUNBUFFERED=1
say_machine
[ $# -gt 0 ] || set -- model plain graph
for name in "$@"; do
    case $name in
        model | plain | graph | genai | genai-graph)
            # shellcheck disable=SC2086 # several options in one variable
            part "$name" "$python" scripts/gpu_generate.py "$name" --bin "$bin" --records "$logs" \
                --work "${MX_GENERATE:-/dev/shm/mx_generate}" ${MX_GENERATE_OPTIONS:-}
            ;;
        *) echo "error: no part named '$name' (model, plain, graph, genai, genai-graph)" >&2; exit 2 ;;
    esac
done
finish
