"""A copy of a GGUF file with all weights in one dtype, so that llama.cpp computes with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import gguf


def write_in(source: Path, target: Path, dtype: str) -> None:
    """Writes `source` with its matrices in `dtype` ("float32" or "bfloat16"); vectors are in fp32."""
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
        if dtype == "bfloat16" and values.ndim > 1:
            narrow = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quantize(values, narrow), raw_dtype=narrow)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
