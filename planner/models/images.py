"""What families share about images: its tensor, and the size that some need to know."""

from __future__ import annotations

from typing import Any

from planner.dtypes import DType
from planner.errors import InputError, Problem
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor


def needed_size(model_type: str, image_size: int | None) -> int:
    """`image_size` where the family cannot do without it; InputError where it is not given."""
    if image_size is None:
        message = f"is needed: a {model_type} model spends tokens by the size of the image"
        raise InputError(Problem("image_size", message, allowed="the edge of a square, in pixels"))
    return image_size


def image_input(
    recorder: Recorder, shape: tuple[Any, ...], dtype: DType = DType.FLOAT32,
    name: str = "pixel_values",
) -> Tensor:  # fmt: skip
    """One of the tensors that a processor makes of images, on the device."""
    with recorder.scope("inputs"):
        return Tensor(recorder.allocate(shape, dtype, name, "inputs"), shape, dtype)
