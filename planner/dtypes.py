"""Element types, as torch names them, and their sizes in bytes."""

from __future__ import annotations

from enum import Enum


class DType(Enum):
    """A storage element type. `.itemsize` is bytes an element."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT64 = "int64"
    INT32 = "int32"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    itemsize: int
    is_floating: bool
    is_16bit: bool


_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}
for _dtype in DType:
    _dtype.itemsize = _SIZES.get(_dtype.value, 1)
    _dtype.is_floating = _dtype.value.endswith(("float32", "float16"))
    _dtype.is_16bit = _dtype.value in ("bfloat16", "float16")

F32, BF16, F16 = DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16
INT64, INT32, INT8, UINT8 = DType.INT64, DType.INT32, DType.INT8, DType.UINT8
BOOL = DType.BOOL
