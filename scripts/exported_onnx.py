"""What happens to an ONNX file after torch.onnx wrote it: clean metadata, named axes, one data file."""

import os

# Metadata that holds file names and source lines of the machine that exported.
STRIPPED_METADATA = ("pkg.torch.onnx.stack_trace",)
# Smaller tensors stay in the model file: shapes and scalars must be readable without the data file.
SMALLEST_EXTERNAL = 1024  # bytes


class ExportError(Exception):
    """A failure the user can act on: printed as one line, exit code 1."""


def finish(raw, path, external, axes):
    """Cleans the exported file `raw` and writes it, with its data in at most one file, to `path`.

    `axes(name)` gives the names of an input's or output's free axes, {axis: name}.
    """
    import onnx

    model = onnx.load(str(raw), load_external_data=False)
    strip_metadata(model.graph)
    for function in model.functions:
        strip_metadata(function)
    name_axes(model.graph, axes)
    data = path.with_name(path.name + ".data")
    for old in (path, data):
        old.unlink(missing_ok=True)
    if external:
        pack_external(model, raw.parent, data)
    else:
        onnx.load_external_data_for_model(model, str(raw.parent))
    onnx.save(model, str(path))


def strip_metadata(graph):
    """Removes stack traces and documentation strings (which hold file names), in subgraphs too."""
    for node in graph.node:
        node.ClearField("doc_string")
        for index in reversed(range(len(node.metadata_props))):
            if node.metadata_props[index].key in STRIPPED_METADATA:
                del node.metadata_props[index]
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for sub in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                strip_metadata(sub)


def name_axes(graph, axes):
    """The dynamo exporter names free axes s12, s34, ...: give them the names that the documentation uses."""
    for value in list(graph.input) + list(graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = axes(value.name).get(axis)
            if name and not dim.HasField("dim_value"):
                dim.dim_param = name


def pack_external(model, folder, data):
    """Gathers every large initialiser, inline or in a file of its own, into the file `data`."""
    from onnx import TensorProto

    with open(data, "wb") as out:
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                copy_range(folder / entry["location"], entry, out, tensor)
            elif len(tensor.raw_data) >= SMALLEST_EXTERNAL:
                start = align(out)
                out.write(tensor.raw_data)
                point_to(tensor, out.name, start, len(tensor.raw_data))
                tensor.ClearField("raw_data")


def copy_range(source, entry, out, tensor):
    start = align(out)
    with open(source, "rb") as file:
        file.seek(int(entry.get("offset", 0)))
        left = int(entry["length"]) if "length" in entry else os.fstat(file.fileno()).st_size
        total = left
        while left:
            chunk = file.read(min(left, 1 << 24))
            if not chunk:
                raise ExportError(f"{source} ends {left} bytes before the end of tensor {tensor.name!r}")
            out.write(chunk)
            left -= len(chunk)
    point_to(tensor, out.name, start, total)


def align(out):
    """Pads `out` to 64 bytes, so that a mapped file gives aligned tensors."""
    out.write(b"\0" * (-out.tell() % 64))
    return out.tell()


def point_to(tensor, file, offset, length):
    del tensor.external_data[:]
    tensor.data_location = 1
    for key, value in (("location", os.path.basename(file)), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
