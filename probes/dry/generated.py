"""Run the Python that inductor wrote for CUDA on meta tensors, under the recorder.

Its buffers are allocated, reused and deleted by its own lines; a generated kernel does nothing; a
library's operation is dispatched, so that its stand-in tells its temporaries.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from planner.errors import UnsupportedError
from probes.dry.recorder import Recorder

aten = torch.ops.aten
_ALLOCATORS = ("empty_strided_cuda", "empty_strided")


def load(source: str, recorder: Recorder) -> Callable[[list[Any]], Any]:
    """The `call` of a generated module."""
    module = ast.parse(source)
    wanted = [n for n in module.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    body: list[ast.stmt] = [n for n in wanted if n.name in ("Runner", "call")]
    for statement in body:
        for lines in _blocks(statement):
            _name_buffers(lines)
    wrapper = _Wrapper(recorder)
    scope = wrapper.scope()
    for kernel in _unknown_names(body, scope):
        scope[kernel] = SimpleNamespace(run=wrapper.launch)
    code = compile(ast.Module(body=body, type_ignores=[]), "<inductor>", "exec")
    exec(code, scope)
    call: Callable[[list[Any]], Any] = (
        scope["Runner"](partitions=[]).call if "Runner" in scope else scope["call"]
    )
    return call


class _Wrapper:
    """The names that the generated text uses."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def scope(self) -> dict[str, Any]:
        cuda = SimpleNamespace(_DeviceGuard=lambda _: nullcontext(), set_device=lambda _: None)
        return {
            "torch": SimpleNamespace(
                cuda=cuda, ops=torch.ops, float32=torch.float32, float16=torch.float16,
                bfloat16=torch.bfloat16, int32=torch.int32, int64=torch.int64, bool=torch.bool,
                uint8=torch.uint8, int8=torch.int8, float64=torch.float64, device=torch.device,
                uint64=torch.uint64, strided=torch.strided,
            ),
            "aten": aten, "empty_strided_cuda": self.allocate,
            "reinterpret_tensor": reinterpret, "extern_kernels": _Extern(self.recorder),
            "assert_size_stride": _nothing, "assert_alignment": _nothing,
            "get_raw_stream": _nothing, "device": torch.device,
        }  # fmt: skip

    def allocate(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, op: str
    ) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        self.recorder.track(tensor, op)
        return tensor

    def launch(self, *args: Any, **_: Any) -> None:
        """A generated kernel: no bytes of its own."""
        self.recorder.work.count_kernel(self.recorder.phase, args)


class _Extern:
    """cuBLAS behind inductor's `extern_kernels`: results are given, the workspace is taken."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Callable[..., None]:
        func = getattr(aten, name).default

        def product(*args: Any, out: torch.Tensor, **kwargs: Any) -> None:
            self._recorder.product(func, args, kwargs, out)

        return product


def reinterpret(
    x: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> torch.Tensor:
    """A view of the storage, as `_reinterpret_tensor` gives it."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        return x.detach().as_strided(size, stride, x.storage_offset() + offset)


def _nothing(*_: Any) -> None:
    """Checks and streams."""


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for inner in ast.walk(node):
        lines = getattr(inner, "body", None)
        if isinstance(lines, list):
            yield lines


def _name_buffers(lines: list[ast.stmt]) -> None:
    """Tell each allocation which kernel it is made for: the next one that is given the buffer."""
    for index, line in enumerate(lines):
        if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.Call):
            continue
        call, target = line.value, line.targets[0]
        if not isinstance(call.func, ast.Name) or call.func.id not in _ALLOCATORS:
            continue
        assert isinstance(target, ast.Name)
        label = next(filter(None, (_kernel(x, target.id) for x in lines[index + 1 :])), "compiled")
        call.args.append(ast.copy_location(ast.Constant(label), call))


def _kernel(line: ast.stmt, buffer: str) -> str:
    """The kernel that a line calls with `buffer`, or ""."""
    if not isinstance(line, ast.Expr) or not isinstance(line.value, ast.Call):
        return ""
    if not any(isinstance(n, ast.Name) and n.id == buffer for n in ast.walk(line)):
        return ""
    called = ast.unparse(line.value.func)
    if called.startswith("triton_"):
        words = called.removesuffix(".run").split("_", 2)[2]
        return words.rpartition("_")[0]
    return called.rpartition(".")[2]


def _unknown_names(body: list[ast.stmt], scope: dict[str, Any]) -> list[str]:
    """Generated kernels. Raises UnsupportedError for a name that is no kernel's."""
    made: set[str] = {n.name for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    read: set[str] = set()
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    unknown = sorted(n for n in read - made - scope.keys() if not hasattr(builtins, n))
    for name in unknown:
        if not name.startswith("triton_"):
            raise UnsupportedError(f"generated code uses {name}, which is not known here")
    return unknown
