// Runs a rewritten model and prints the most probable next tokens and the MX kernels of the session.
// The operator library is loaded by its path: a program that has ONNX Runtime needs one more line.
//
//   run MODEL --library libmx_custom_ops.so --ids 1,15,27,3 [--cuda] [--top 5]

#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

#include <mx_custom_ops.h>

namespace {

const char* const kUsage = "usage: run MODEL --library libmx_custom_ops.so --ids 1,15,27,3 [--cuda] [--top 5]";

struct Options {
  std::string model;
  std::string library;
  std::vector<int64_t> ids;
  bool cuda = false;
  size_t top = 5;
};

// Numbers separated by commas.
std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> values;
  const char* at = text.c_str();
  while (true) {
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(at, &end, 10);
    if (end == at || errno != 0 || value < 0 || (*end != ',' && *end != '\0')) {
      throw std::invalid_argument("'" + text + "' is not a list of numbers such as 1,15,27,3");
    }
    values.push_back(value);
    if (*end == '\0') return values;
    at = end + 1;
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::invalid_argument(word + " needs a value");
      return argv[++i];
    };
    if (word == "--library") {
      options.library = value();
    } else if (word == "--ids") {
      options.ids = numbers(value());
    } else if (word == "--top") {
      options.top = static_cast<size_t>(numbers(value()).front());
    } else if (word == "--cuda") {
      options.cuda = true;
    } else if (word.rfind("--", 0) != 0 && options.model.empty()) {
      options.model = word;
    } else {
      throw std::invalid_argument("unexpected argument '" + word + "'");
    }
  }
  if (options.model.empty() || options.library.empty() || options.ids.empty()) {
    throw std::invalid_argument("MODEL, --library and --ids are needed");
  }
  return options;
}

Ort::Session make_session(Ort::Env& env, const Options& options) {
  Ort::SessionOptions session_options;
  // The line that a program needs.
  session_options.RegisterCustomOpsLibrary(options.library.c_str());
  if (options.cuda) {
    OrtCUDAProviderOptionsV2* cuda = nullptr;
    Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
    const char* const keys[] = {"device_id", "use_tf32"};
    const char* const values[] = {"0", "0"};
    OrtStatus* status = Ort::GetApi().UpdateCUDAProviderOptions(cuda, keys, values, 2);
    if (status == nullptr) session_options.AppendExecutionProvider_CUDA_V2(*cuda);
    Ort::GetApi().ReleaseCUDAProviderOptions(cuda);
    Ort::ThrowOnError(status);
  }
  return Ort::Session(env, options.model.c_str(), session_options);
}

// Logits of the last position, [vocabulary].
std::vector<float> last_logits(Ort::Session& session, std::vector<int64_t> ids) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t shape[] = {1, static_cast<int64_t>(ids.size())};
  std::vector<int64_t> mask(ids.size(), 1);

  std::vector<std::string> names;
  std::vector<const char*> pointers;
  std::vector<Ort::Value> inputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
  }
  for (const std::string& name : names) {
    if (name != "input_ids" && name != "attention_mask") {
      throw std::runtime_error("the model has an input '" + name + "', which this example does not feed");
    }
    std::vector<int64_t>& data = name == "input_ids" ? ids : mask;
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, data.data(), data.size(), shape, 2));
    pointers.push_back(name.c_str());
  }
  const char* const output = "logits";
  const auto outputs = session.Run(Ort::RunOptions{}, pointers.data(), inputs.data(), inputs.size(), &output, 1);

  const auto info = outputs.front().GetTensorTypeAndShapeInfo();
  const auto extents = info.GetShape();
  const auto count = info.GetElementCount();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || extents.empty() || count == 0) {
    throw std::runtime_error("'logits' is not a float tensor with values");
  }
  const float* end = outputs.front().GetTensorData<float>() + count;
  return std::vector<float>(end - extents.back(), end);
}

// What became of the MX nodes of every live session of the process, as JSON.
std::string kernels(const std::string& library) {
  // ONNX Runtime has loaded it: the loader gives the same one again, which is not unloaded here.
  void* handle = dlopen(library.c_str(), RTLD_NOW);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto list = reinterpret_cast<decltype(&MxKernels)>(dlsym(handle, "MxKernels"));
  if (list == nullptr) throw std::runtime_error(library + " has no MxKernels: it is an older one");
  std::string text(list(nullptr, 0), '\0');
  list(&text[0], text.size());
  text.resize(text.size() - 1);  // The terminating zero.
  return text;
}

void run(const Options& options) {
  const OrtApiBase* base = OrtGetApiBase();
  if (base->GetApi(ORT_API_VERSION) == nullptr) {
    throw std::runtime_error("built with the headers of ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                             ", but the library is " + base->GetVersionString());
  }
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "mx");
  Ort::Session session = make_session(env, options);
  const std::vector<float> logits = last_logits(session, options.ids);

  std::vector<size_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), size_t{0});
  std::stable_sort(tokens.begin(), tokens.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  tokens.resize(std::min(tokens.size(), options.top));
  std::printf("token logit\n");
  for (const size_t token : tokens) {
    std::printf("%zu %.*g\n", token, std::numeric_limits<float>::max_digits10, logits[token]);
  }
  std::printf("%s\n", kernels(options.library).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return EXIT_SUCCESS;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "error: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
