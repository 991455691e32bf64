"""torch's own inductor run to its last line of Python for a CUDA card that is not there: what it
fuses, allocates, reuses and frees is decided before a kernel is compiled.

A graph is traced on meta; before inductor's passes see it, its tensors are said to be on "cuda:0".
They stay fake, so nothing runs. Read in torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx as fx
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import shape_env_from_inputs
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from probes.dry.target import Target

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
_HOST = torch.device("cpu", 0)  # a CPU that tensors of the graph never name
Call = Callable[[list[Any]], Sequence[Any]]


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], target: Target,
    load: Callable[[str], Call],
) -> Any:  # fmt: skip
    """What `torch.compile`'s default backend makes of a graph on meta, on `target`. `load`: its
    source text (a module with a `call`) -> the function to run in its place."""

    def inner(module: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        call = load(_source(module, example_inputs, target, kwargs))

        def boxed(arguments: list[Any]) -> Sequence[Any]:
            return call(arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    passes = fx._recursive_joint_graph_passes

    def joint_passes(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _to_cuda(module, constants=_HOST)
        if "input_device" in kwargs:  # where patterns are traced for real
            kwargs["input_device"] = _CPU
        with _a_card(target):
            return passes(module, *args, **kwargs)

    with mock.patch.object(fx, "_recursive_joint_graph_passes", joint_passes):
        return fx.compile_fx(graph, list(inputs), inner_compile=inner)


def _source(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], target: Target,
    kwargs: dict[str, Any],
) -> str:  # fmt: skip
    """`_InProcessFxCompile.codegen_and_compile` up to the text of the Python wrapper."""
    mode = _to_cuda(module)
    inputs = [_on_cuda(x, mode) for x in example_inputs]
    inference = kwargs.get("is_inference", False)
    with _disable_current_modes(), _a_card(target), torch.no_grad(), DebugContext():
        view_to_reshape(module)
        fx._recursive_record_original_output_strides(module)
        with V.set_fake_mode(mode):
            fx._recursive_post_grad_passes(module, is_inference=inference)
            with fx.maybe_disable_comprehensive_padding(inputs):
                graph = GraphLowering(
                    module, example_inputs=inputs, shape_env=shape_env_from_inputs(inputs),
                    graph_id=kwargs.get("graph_id"), is_inference=inference,
                    is_backward=kwargs.get("is_backward", False),
                )  # fmt: skip
                graph.freeze_runtime_asserts()
                with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                    graph.run(*inputs)
                    _report_strides(graph)
                    return str(graph.codegen()[0].value)


def _report_strides(graph: GraphLowering) -> None:
    """AOTAutograd compiles the backward for the strides that the forward's results have."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    for out in graph.graph_outputs:
        layout = getattr(out, "maybe_get_layout", lambda: None)()
        strides = getattr(layout, "stride", None)
        context.output_strides.append(tuple(int(s) for s in strides) if strides else None)


def _to_cuda(module: torch.fx.GraphModule, constants: torch.device = _CUDA) -> Any:
    """Say in the graph that what is on meta is on the card; returns its fake mode. `constants`:
    where constructors make theirs, as constant folding makes one element to read its value."""

    def moved(device: torch.device) -> torch.device:
        return constants if device.type == "meta" or device == _HOST else device

    values = [node.meta.get("val") for node in module.graph.nodes]
    mode = detect_fake_mode(values)
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(lambda x: _on_cuda(x, mode), node.meta["val"])
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map_only(
                torch.device, moved, (node.args, node.kwargs)
            )
    module.recompile()
    return mode


def _on_cuda(x: Any, mode: Any) -> Any:
    if not isinstance(x, FakeTensor) or x.fake_device.type != "meta":
        return x
    with unset_fake_temporarily(), _disable_current_modes():
        inner = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(mode, inner, _CUDA)


@contextmanager
def _a_card(target: Target) -> Iterator[None]:
    """What inductor asks about the device and about Triton; the text of kernels is not made."""
    properties = SimpleNamespace(
        name="", gcnArchName="",  # read where a plain product is lowered, used nowhere
        major=target.major, minor=target.minor, multi_processor_count=target.multiprocessors,
        regs_per_multiprocessor=1 << 16, max_threads_per_multi_processor=2048, warp_size=32,
        max_threads_per_block=1024,
    )  # fmt: skip
    capability = (target.major, target.minor)
    interface = device_interface.CudaInterface
    values: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", capability),
        (torch.cuda, "current_device", 0),
        (interface, "get_device_properties", properties),
        (interface, "get_compute_capability", target.major * 10 + target.minor),
        (interface.Worker, "get_device_properties", properties),
        (interface.Worker, "current_device", 0),
        (torch._inductor.scheduler, "has_triton", True),
        (torch.utils._triton, "triton_hash_with_backend", ""),
    ]
    with ExitStack() as stack:
        for owner, name, value in values:
            stack.enter_context(mock.patch.object(owner, name, _constant(value)))
        # copies between tensors of a device take its guard, which torch for a CPU does not have
        stack.enter_context(
            mock.patch.object(FakeTensor, "copy_", lambda self, *_: self, create=True)
        )
        yield


def _constant(value: Any) -> Any:
    """Works as a function and as a static method."""
    return staticmethod(lambda *_, **__: value).__func__
