# The MX operators as the imported targets mx::headers and mx::custom_ops (headers and library).
#
#   MX_ROOT                a folder with include/mx_custom_ops.h and lib/libmx_custom_ops.so; default: the checkout
#                          that this file lies in, after `cargo build --release`
#   MX_CUSTOM_OPS_LIBRARY  libmx_custom_ops.so, where it lies elsewhere: in the Python package, for one

set(MX_ROOT "" CACHE PATH "folder with include/ and lib/ of the MX operators")
get_filename_component(_mx_checkout "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

find_path(MX_CUSTOM_OPS_INCLUDE_DIR mx_custom_ops.h
  HINTS "${MX_ROOT}" "${_mx_checkout}/custom_ops" PATH_SUFFIXES include)
find_library(MX_CUSTOM_OPS_LIBRARY mx_custom_ops
  HINTS "${MX_ROOT}" "${_mx_checkout}/target/release" PATH_SUFFIXES lib)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(MxCustomOps
  REQUIRED_VARS MX_CUSTOM_OPS_INCLUDE_DIR MX_CUSTOM_OPS_LIBRARY
  REASON_FAILURE_MESSAGE "run `cargo build --release -p mx-custom-ops`, or pass -DMX_CUSTOM_OPS_LIBRARY=libmx_custom_ops.so")

if(MxCustomOps_FOUND AND NOT TARGET mx::custom_ops)
  add_library(mx::headers INTERFACE IMPORTED)
  set_target_properties(mx::headers PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${MX_CUSTOM_OPS_INCLUDE_DIR}")
  add_library(mx::custom_ops SHARED IMPORTED)
  set_target_properties(mx::custom_ops PROPERTIES
    IMPORTED_LOCATION "${MX_CUSTOM_OPS_LIBRARY}"
    # The library has no soname: without this its path would be written into the program.
    IMPORTED_NO_SONAME ON
    INTERFACE_LINK_LIBRARIES mx::headers)
endif()
mark_as_advanced(MX_CUSTOM_OPS_INCLUDE_DIR MX_CUSTOM_OPS_LIBRARY)
