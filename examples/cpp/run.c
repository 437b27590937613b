/* Runs a rewritten model through ONNX Runtime's C API and prints the most probable next tokens and the MX kernels of
 * the session. The operator library is linked: no path is needed when it runs.
 *
 *   run_c MODEL --ids 1,15,27,3 [--cuda] [--top 5]
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <onnxruntime_c_api.h>

#include <mx_custom_ops.h>

#define MAX_IDS 4096

static const OrtApi *api;

typedef struct {
  const char *model;
  int64_t ids[MAX_IDS];
  size_t count; /* Of ids. */
  size_t top;
  int cuda;
} Options;

/* What is given back at the end, whatever happened; null where it was not made. */
typedef struct {
  OrtEnv *env;
  OrtSessionOptions *options;
  OrtCUDAProviderOptionsV2 *cuda;
  OrtSession *session;
  OrtMemoryInfo *memory;
  OrtValue *inputs[2];
  OrtValue *logits;
  OrtTensorTypeAndShapeInfo *info;
} State;

/* Prints an error of ONNX Runtime; 1 when there was none. */
static int ok(OrtStatus *status) {
  if (status == NULL) return 1;
  fprintf(stderr, "error: %s\n", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  return 0;
}

static int parse_ids(const char *text, Options *options) {
  for (options->count = 0; options->count < MAX_IDS;) {
    char *end;
    errno = 0;
    long long id = strtoll(text, &end, 10);
    if (end == text || errno != 0 || id < 0 || (*end != ',' && *end != '\0')) return 0;
    options->ids[options->count++] = id;
    if (*end == '\0') return 1;
    text = end + 1;
  }
  return 0;
}

static int parse(int argc, char **argv, Options *options) {
  int i;
  options->top = 5;
  for (i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--cuda") == 0) {
      options->cuda = 1;
    } else if (strcmp(argv[i], "--ids") == 0 && i + 1 < argc) {
      if (!parse_ids(argv[++i], options)) return 0;
    } else if (strcmp(argv[i], "--top") == 0 && i + 1 < argc) {
      options->top = strtoul(argv[++i], NULL, 10);
    } else if (argv[i][0] != '-' && options->model == NULL) {
      options->model = argv[i];
    } else {
      return 0;
    }
  }
  return options->model != NULL && options->count > 0;
}

static int make_session(const Options *options, State *state) {
  const char *const keys[] = {"device_id", "use_tf32"};
  const char *const values[] = {"0", "0"};
  if (!ok(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "mx", &state->env))) return 0;
  if (!ok(api->CreateSessionOptions(&state->options))) return 0;
  /* The line that a program needs. */
  if (!ok(RegisterCustomOps(state->options, OrtGetApiBase()))) return 0;
  if (options->cuda) {
    if (!ok(api->CreateCUDAProviderOptions(&state->cuda))) return 0;
    if (!ok(api->UpdateCUDAProviderOptions(state->cuda, keys, values, 2))) return 0;
    if (!ok(api->SessionOptionsAppendExecutionProvider_CUDA_V2(state->options, state->cuda))) return 0;
  }
  return ok(api->CreateSession(state->env, options->model, state->options, &state->session));
}

/* Feeds `input_ids` and `attention_mask`, both [1, count]. */
static int run(Options *options, State *state) {
  static int64_t mask[MAX_IDS];
  const char *const names[] = {"input_ids", "attention_mask"};
  const char *const output = "logits";
  int64_t *data[] = {options->ids, mask};
  const int64_t shape[] = {1, (int64_t)options->count};
  size_t inputs = 0, i;
  for (i = 0; i < options->count; ++i) mask[i] = 1;
  if (!ok(api->SessionGetInputCount(state->session, &inputs))) return 0;
  if (inputs != 1 && inputs != 2) {
    fprintf(stderr, "error: the model has %zu inputs; this example feeds input_ids and attention_mask\n", inputs);
    return 0;
  }
  if (!ok(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &state->memory))) return 0;
  for (i = 0; i < inputs; ++i) {
    if (!ok(api->CreateTensorWithDataAsOrtValue(state->memory, data[i], options->count * sizeof(int64_t), shape, 2,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &state->inputs[i])))
      return 0;
  }
  return ok(api->Run(state->session, NULL, names, (const OrtValue *const *)state->inputs, inputs, &output, 1,
                     &state->logits));
}

/* Prints the largest logits of the last position. */
static int print_top(const Options *options, State *state) {
  enum ONNXTensorElementDataType type;
  size_t count, rank, i;
  int64_t shape[8];
  float *values;
  if (!ok(api->GetTensorTypeAndShape(state->logits, &state->info))) return 0;
  if (!ok(api->GetTensorElementType(state->info, &type))) return 0;
  if (!ok(api->GetTensorShapeElementCount(state->info, &count))) return 0;
  if (!ok(api->GetDimensionsCount(state->info, &rank))) return 0;
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || rank == 0 || rank > 8 || count == 0) {
    fprintf(stderr, "error: 'logits' is not a float tensor with values\n");
    return 0;
  }
  if (!ok(api->GetDimensions(state->info, shape, rank))) return 0;
  if (!ok(api->GetTensorMutableData(state->logits, (void **)&values))) return 0;
  values += count - (size_t)shape[rank - 1];
  count = (size_t)shape[rank - 1];
  printf("token logit\n");
  for (i = 0; i < options->top && i < count; ++i) {
    /* Those printed already are the ones above the last; of equal logits the lower token comes first. */
    static size_t last;
    size_t best = count, token;
    for (token = 0; token < count; ++token) {
      int printed = i > 0 && (values[token] > values[last] || (values[token] == values[last] && token <= last));
      if (!printed && (best == count || values[token] > values[best])) best = token;
    }
    if (best == count) break; /* The rest are NaN. */
    printf("%zu %.9g\n", best, values[best]);
    last = best;
  }
  return 1;
}

/* Prints what became of the MX nodes of every live session of the process, as JSON. */
static int print_kernels(void) {
  size_t size = MxKernels(NULL, 0);
  char *text = malloc(size);
  if (text == NULL) return 0;
  MxKernels(text, size);
  printf("%s\n", text);
  free(text);
  return 1;
}

static void release(State *state) {
  if (state->info) api->ReleaseTensorTypeAndShapeInfo(state->info);
  if (state->logits) api->ReleaseValue(state->logits);
  if (state->inputs[0]) api->ReleaseValue(state->inputs[0]);
  if (state->inputs[1]) api->ReleaseValue(state->inputs[1]);
  if (state->memory) api->ReleaseMemoryInfo(state->memory);
  if (state->session) api->ReleaseSession(state->session);
  if (state->cuda) api->ReleaseCUDAProviderOptions(state->cuda);
  if (state->options) api->ReleaseSessionOptions(state->options);
  if (state->env) api->ReleaseEnv(state->env);
}

int main(int argc, char **argv) {
  static Options options;
  State state = {0};
  int good;
  if (!parse(argc, argv, &options)) {
    fprintf(stderr, "usage: run_c MODEL --ids 1,15,27,3 [--cuda] [--top 5]\n");
    return 2;
  }
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == NULL) {
    fprintf(stderr, "error: built with the headers of ONNX Runtime 1.%d, but the library is %s\n", ORT_API_VERSION,
            OrtGetApiBase()->GetVersionString());
    return 1;
  }
  good = make_session(&options, &state) && run(&options, &state) && print_top(&options, &state) && print_kernels();
  release(&state);
  return good ? 0 : 1;
}
