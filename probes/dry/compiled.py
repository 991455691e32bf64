"""`torch.compile` for functions on meta: captured once, then replayed under the recorder as
inductor's code for the card would run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._C._dynamo.eval_frame import reset_code
from torch._functorch import config as functorch_config
from torch.nn.modules import module as torch_module
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from probes.dry.attention import attend
from probes.dry.generated import load
from probes.dry.inductor import Call, compile_graph
from probes.dry.recorder import Recorder

_HOOKS = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_always_called",
)  # fmt: skip

# Both directions compiled in forward, where a failure can be told; what is compiled is not stored.
_AT_ONCE = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}


class Compiler:
    """Use `compiler(function)` where a recipe calls `torch.compile(function)`.

    Dynamo captures, AOTAutograd divides into forward and backward, and inductor writes their code
    as they would on the card: what is kept between the two is theirs to decide.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(layer, *tensors, **kwargs)` compiled; where torch cannot compile it here,
        uncompiled and named in the answer."""
        reset_code(function.__code__)  # of an earlier trace
        # static shapes: a trace has one; sizes seen in earlier traces must not become symbols
        compiled = torch.compile(function, backend=self._backend, dynamic=False)

        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                args = tuple(x.detach() for x in args)  # the same code, compiled once
            try:
                with _plain():
                    return compiled(first, *args, **kwargs)
            except Exception as error:  # torch's compiler raises what it likes
                reason = " ".join(str(error).strip().splitlines()[:2])
                self.recorder.note_unknown(
                    f"{type(first).__name__} traced uncompiled, it may hold more between kernels: "
                    f"{type(error).__name__}: {reason}"
                )
            return function(first, *args, **kwargs)

        return run

    def _backend(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with functorch_config.patch(_AT_ONCE):
            return compile_graph(graph, inputs, self.recorder.target, self._load)

    def _load(self, source: str) -> Call:
        call = load(source, self.recorder)

        def run(arguments: list[Any]) -> Sequence[Any]:
            with self.recorder, torch.no_grad():
                return call(arguments)

        return run


@contextmanager
def _plain() -> Iterator[None]:
    """No modes, no hooks: dynamo would skip or trace them. Attention by the kernel of the card."""
    with ExitStack() as stack:
        for name in _HOOKS:
            stack.enter_context(mock.patch.object(torch_module, name, OrderedDict()))
        stack.enter_context(
            mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention)
        )
        stack.enter_context(_disable_current_modes())
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


def _attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    return attend(None, *args, **kwargs)
