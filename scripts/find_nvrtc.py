"""Prints the path of libnvrtc in this Python's nvidia packages; exit code 1 when there is none."""

import glob
import importlib.util
import os
import sys

spec = importlib.util.find_spec("nvidia")
found = []
for folder in spec.submodule_search_locations if spec else []:
    for lib in ("cu13/lib", "cuda_nvrtc/lib", "cu*/lib"):
        found += glob.glob(os.path.join(folder, lib, "libnvrtc.so.1[0-9]"))
if not found:
    sys.exit(1)
print(found[0])
