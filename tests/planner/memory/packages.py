"""What the packages' own optimizers hold, on the meta device: `python -m
tests.planner.memory.packages` (with galore-torch, apollo-torch, grokadamw, lomo-optim,
schedulefree, torch-optimi and torchao importable) writes tests/planner/data/optimizers.json.

Trainer's own method makes each optimizer for a few modules; gradients are given, and steps taken
under a mode that counts storages. Bytes are rounded as the allocator rounds.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

RESULTS = Path(__file__).parents[1] / "data" / "optimizers.json"
PACKAGES = ("galore-torch", "apollo-torch", "grokadamw", "lomo-optim", "schedulefree",
            "torch-optimi", "torchao", "torch", "transformers", "bitsandbytes")  # fmt: skip
# module -> shape of a linear's weight, or of a norm's
STEPS = 8  # RAdam is SGD before its sixth
MODULES = {"down": (512, 1024), "up": (1536, 512), "small": (300, 64), "narrow": (2048, 16),
           "flat": (16, 2048), "norm": (512,)}  # fmt: skip
STATES_ONLY = ("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw")  # compiled, Triton
NAMES = ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "grokadamw", "lomo",
         "galore_adamw", "galore_adafactor", "apollo_adamw", *STATES_ONLY)  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of the meta storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(item, torch.Tensor) and item.device.type == "meta":
                self.count(item)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return  # a wrapper: its parts are counted
        storage = tensor.untyped_storage()
        if storage._cdata in self.known or not storage.nbytes():
            return
        size = -(-storage.nbytes() // 512) * 512
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        self.known[storage._cdata] = weakref.ref(storage, partial(self._gone, storage._cdata, size))

    def _gone(self, key: int, size: int, _: object) -> None:
        self.bytes -= size
        del self.known[key]


def measure(name: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the states after the steps, and the most above them and gradients in the last."""
    model = torch.nn.Module()
    with torch.device("meta"):
        for module, shape in MODULES.items():
            layer = torch.nn.Linear(*reversed(shape), bias=False) if len(shape) == 2 else \
                torch.nn.LayerNorm(shape, bias=False)  # fmt: skip
            model.add_module(module, layer.to(dtype))
    optimizer = _create(name, model)
    live = Live()
    with live, _meta_allowed():
        grads = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in model.parameters())
        before = live.bytes
        for _ in range(STEPS):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
                live.count(parameter)  # some optimizers replace it
            held = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in model.parameters())
            live.peak = live.bytes
            with mock.patch("torch.compile", lambda function, **_: function):
                _step(name, optimizer)
            peak = live.peak
            for parameter in model.parameters():
                parameter.grad = None
            for state in optimizer.state.values():
                for tensor in state.values():
                    for part in getattr(tensor, "tensor_attrs", ()):
                        live.count(getattr(tensor, part))
            states = live.bytes - before - held
    return {"states_bytes": states, "step_bytes": peak - before - held - states - grads}


def _create(name: str, model: torch.nn.Module) -> Any:
    trainer = object.__new__(Trainer)
    trainer.args = TrainingArguments(
        output_dir="unused", optim=name, use_cpu=True, report_to=[],
        optim_target_modules="all-linear" if "galore" in name or "apollo" in name else None,
        optim_args="update_proj_gap=1" if "galore" in name or "apollo" in name else None,
    )  # fmt: skip
    trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model, None, None
    return Trainer.create_optimizer(trainer)


def _step(name: str, optimizer: Any) -> None:
    if name == "lomo":  # its hook meets one gradient at a time
        waiting = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
        for parameter, _ in waiting:
            parameter.grad = None
        while waiting:
            parameter, parameter.grad = waiting.pop(0)
            optimizer.grad_func(None)
        return
    if name == "stable_adamw":  # its Triton kernels need a card: the states alone
        for group in optimizer.param_groups:
            group["triton"] = True
            for parameter in group["params"]:
                optimizer._init_state(group, optimizer.state[parameter], parameter)
        return
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()


@contextmanager
def _meta_allowed() -> Iterator[None]:
    """Meta tensors "move" to the host as their zeros, and have no random generator."""
    move, draw, generator = torch.Tensor.to, torch.randn, torch.Generator

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type == "meta" and args and str(args[0]) == "cpu":
            return torch.zeros(self.shape, dtype=self.dtype, device="cpu")
        return move(self, *args, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch("torch.randn", lambda shape, generator, **kwargs: draw(shape, **kwargs)),
        mock.patch("torch.Generator", side_effect=lambda device=None: generator()),
        mock.patch("torch.Tensor.__bool__", return_value=False),
    ):
        yield


def main() -> None:
    found: dict[str, Any] = {"versions": {}, "measured": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    for name in NAMES:
        found["measured"][name] = {
            str(dtype).removeprefix("torch."): measure(name, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
