# ONNX Runtime as the imported target onnxruntime::onnxruntime.
#
#   ONNXRUNTIME_ROOT         a folder with include/ and lib/: an unpacked release, or a prefix such as /usr
#   ONNXRUNTIME_INCLUDE_DIR  the folder of onnxruntime_c_api.h, where it lies elsewhere
#   ONNXRUNTIME_LIBRARY      libonnxruntime.so, where it lies elsewhere
#   ONNXRUNTIME_FETCH        downloads a release of ONNXRUNTIME_VERSION from ONNXRUNTIME_URL

set(ONNXRUNTIME_ROOT "" CACHE PATH "folder with include/ and lib/ of ONNX Runtime")
option(ONNXRUNTIME_FETCH "download ONNX Runtime" OFF)

if(ONNXRUNTIME_FETCH)
  set(ONNXRUNTIME_VERSION "1.31.1" CACHE STRING "release to download")
  set(ONNXRUNTIME_URL
    "https://github.com/microsoft/onnxruntime/releases/download/v${ONNXRUNTIME_VERSION}/onnxruntime-linux-x64-${ONNXRUNTIME_VERSION}.tgz"
    CACHE STRING "archive to download; the -gpu- one for CUDA")
  include(FetchContent)
  FetchContent_Declare(onnxruntime_release URL "${ONNXRUNTIME_URL}")
  FetchContent_MakeAvailable(onnxruntime_release)
  set(_ort_root "${onnxruntime_release_SOURCE_DIR}")
else()
  set(_ort_root "${ONNXRUNTIME_ROOT}")
endif()

# Releases have the headers in include/, distributions in include/onnxruntime/, installations of a build in either.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
  HINTS "${_ort_root}"
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime)
find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS "${_ort_root}" PATH_SUFFIXES lib lib64)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime
  REQUIRED_VARS ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY
  REASON_FAILURE_MESSAGE "pass -DONNXRUNTIME_ROOT=FOLDER with include/ and lib/, or -DONNXRUNTIME_FETCH=ON")

if(ONNXRuntime_FOUND AND NOT TARGET onnxruntime::onnxruntime)
  add_library(onnxruntime::onnxruntime SHARED IMPORTED)
  set_target_properties(onnxruntime::onnxruntime PROPERTIES
    IMPORTED_LOCATION "${ONNXRUNTIME_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${ONNXRUNTIME_INCLUDE_DIR}")
endif()
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)
