/* mx_custom_ops.h: libmx_custom_ops.so, the MX operators for ONNX Runtime 1.22 or later (C11, C++17).
 *
 * Register the library on each session options object, before sessions are made of it:
 *   C:   OrtApi::RegisterCustomOpsLibrary_V2(options, "libmx_custom_ops.so")
 *   C++: session_options.RegisterCustomOpsLibrary("libmx_custom_ops.so")
 * No panic or exception leaves the library. A model that breaks the contract below gets an error that
 * names the node. The functions may be called from any thread.
 *
 * OPERATORS, domain "mx", version 1 (opset import), weight layout 1. T is float32, float16 or bfloat16.
 * Sizes in bytes: row_bytes(k) = ceil(k / block_size) * block_size * bits / 8, with bits 8 for fp8_e4m3,
 * fp8_e5m2 and mxint8, 6 for fp6_e3m2 and fp6_e2m3, 4 for fp4_e2m1, 16 for bf16.
 *
 * MxMatMul: Y = alpha * X * W^T + beta * bias
 *   X       T [..., k]
 *   codes   uint8 [n, row_bytes(k)], row-major, W row by row; codes after k are 0
 *   scales  uint8 [n, ceil(k / block_size)] (scale "e8m0") | float32 [1] ("tensor") | left out ("none")
 *   bias    T [n], may be left out
 *   -> Y    T [..., n]
 *   k, n               int
 *   weight_format      string: fp8_e4m3 fp8_e5m2 fp6_e3m2 fp6_e2m3 fp4_e2m1 mxint8 bf16
 *   activation_format  string: a format that X is quantised to, or "none"
 *   block_size         int: 16, 32 (default), 64, 128, 256 elements along k share a scale
 *   scale              string: "e8m0" (default), "none", "tensor"
 *   rounding           string: "even" (default), "nearest", "floor"
 *   scale_rule         string: "floor" (default), "ceil", "even", "rceil"
 *   alpha, beta        float, 1 by default
 *   layout             int, 1 by default; a later one than the library knows is an error
 * MxActMatMul: Y = alpha * A * B, both quantised along k when it runs
 *   A       T [..., m, k] or [k]
 *   B       T [..., k, n], [..., n, k] with transpose_b = 1, or [k]
 *   -> Y    T [..., m, n], broadcast as by MatMul
 *   a_format, b_format (A's by default), block_size, scale ("e8m0", "none"), rounding, scale_rule,
 *   transpose_b (int, 0 by default), alpha
 * MxExpertMatMul: Y = alpha * X * W[index]^T
 *   X       T [..., m, k] or [k]
 *   index   int64 or int32 [i...], each in -experts..experts-1; its dimensions broadcast with X's leading ones
 *   codes   uint8 [experts, n, row_bytes(k)]
 *   scales  uint8 [experts, n, ceil(k / block_size)] ("e8m0") | left out ("none")
 *   -> Y    T [i..., m, n]
 *   the attributes of MxMatMul but beta, and experts (int), index_rank (int, -1 where not known)
 * TokenScores
 *   logits  T [b, s, v]; labels int64 [b, s], -100 = masked; baseline T [b, s, v], may be left out
 *   -> nll, entropy float32, top1 int64 and, with baseline, kl, baseline_nll float32; all [b, s], 0 where
 *      masked, in nats
 *
 * PACKING. fp8, mxint8: a byte a code. fp6: four codes in three bytes, a little-endian bit stream. fp4: two
 * a byte, the first in the low four bits. bf16: two bytes, little-endian. A value is code * 2^(s - 127) with
 * s the block's scale byte; 255 stands for a block with NaN or infinity. mxint8 codes are in 1/64. So a
 * weight takes n * ceil(k/32) * 33 bytes in fp8 and mxint8, * 25 in fp6, * 17 in fp4, with blocks of 32.
 *
 * ENVIRONMENT. MX_LOG: off (default), error, warn: nothing; info, debug, trace: a line a node on stderr when
 * its kernel is made. MX_CPU_REPACK=0: no second copy of weights, slower. MX_CPU_VARIANT: kernels to use.
 */
#ifndef MX_CUSTOM_OPS_H
#define MX_CUSTOM_OPS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Declared by onnxruntime_c_api.h. */
struct OrtSessionOptions;
struct OrtApiBase;
struct OrtStatus;

/* What ONNX Runtime calls when the library is registered. Adds the operators to options; NULL, or a status
 * that the caller releases: an ONNX Runtime older than 1.22, or a second copy of it in the process. */
struct OrtStatus *RegisterCustomOps(struct OrtSessionOptions *options, const struct OrtApiBase *api);

/* The live kernels of this process as JSON: a NUL-terminated array in UTF-8, written into buffer where all of
 * it fits size bytes. Returns the bytes that it takes, the NUL included; 0 is an internal error. A null or too
 * small buffer is left alone; the list may grow between two calls. Fields of an object: id, session (number of
 * its session, from 1), thread (number of the thread that made it), node, op, provider ("CPU", "CUDA"),
 * kernel, weight_format, activation_format, block_size, scale, k, n, layout (null where the operator has no
 * such thing; MxActMatMul: B's and A's format). */
size_t MxKernels(char *buffer, size_t size);

/* The version of the library, such as "0.1.0"; static. */
const char *MxVersion(void);

#ifdef __cplusplus
}
#endif

#endif /* MX_CUSTOM_OPS_H */
