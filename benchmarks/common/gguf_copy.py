"""A copy of a GGUF file with all matrices in one type, so that llama.cpp computes with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import gguf


def write_as(source: Path, target: Path, matrices: str, heads: str) -> None:
    """Writes `source` with its matrices in a type of ggml, such as "BF16" or "Q8_0"; vectors are in fp32.

    heads: the type of the embeddings and the head.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = heads if tensor.name in ("token_embd.weight", "output.weight") else matrices
        narrow = gguf.GGMLQuantizationType[name]
        if name != "F32" and values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(values, narrow), raw_dtype=narrow)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
