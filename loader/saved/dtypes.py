"""Lists the element types by name, without torch: the bytes of an element, and torch's storage class for it."""

from __future__ import annotations

ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}
"""Bytes per element, by dtype: the name that follows ``torch.``."""

STORAGE_DTYPE: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
"""The dtype of each storage class that torch's pickles name."""

QUANTIZED_STORAGE: dict[str, tuple[str, str]] = {
    "QInt8Storage": ("qint8", "int8"),
    "QUInt8Storage": ("quint8", "uint8"),
    "QInt32Storage": ("qint32", "int32"),
}
"""Of the storage classes of quantized tensors: the dtype of the tensor, and that of the integers which it keeps."""

_EXACT_INTEGERS: dict[str, int] = {
    "float64": 53,
    "float32": 24,
    "float16": 11,
    "bfloat16": 8,
    "int64": 63,
    "int32": 31,
    "int16": 15,
    "int8": 7,
    "uint64": 64,
    "uint32": 32,
    "uint16": 16,
    "uint8": 8,
    "bool": 1,
}
"""By dtype: every whole number of at most so many bits, without its sign, is one of its values."""


def dtype_kind(dtype: str) -> str:
    """``float``, ``complex``, ``integer`` (``bool`` too), or the dtype itself where it is of no such kind."""
    if dtype.startswith(("float", "bfloat")) and dtype != "float4_e2m1fn_x2":  # two numbers in each element
        return "float"
    if dtype.startswith("complex"):
        return "complex"
    return "integer" if dtype in _EXACT_INTEGERS else dtype


def keeps_values(source: str, target: str) -> bool:
    """Whether every value of dtype `source` is one of `target` too, by the dtypes alone.

    A float becomes a float of any width: that such a cast rounds is expected.
    """
    if source == target:
        return True
    if dtype_kind(source) == dtype_kind(target) != "integer":
        return dtype_kind(source) in ("float", "complex")
    if dtype_kind(source) != "integer" or dtype_kind(target) not in ("float", "integer"):
        return False
    unsigned = source.startswith("u") or source == "bool"
    signed_target = dtype_kind(target) == "float" or not (target.startswith("u") or target == "bool")
    bits = _EXACT_INTEGERS
    return bits[source] <= bits.get(target, 0) and (unsigned or signed_target)
