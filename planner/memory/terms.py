"""What fills the memory at the peak: the live blocks, grouped into named terms with formulas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from planner.memory.program import Program
from planner.memory.storage import Block

_LAYER = re.compile(r"(layers|blocks|down|block|attn)\.\d+")
_SOURCES = {
    "parameters": "transformers from_pretrained, peft prepare_model_for_kbit_training",
    "adapters": "fp32 beside 16-bit weights (peft tuners/lora; recipes/lavin/adapters.py)",
    "optimizer_states": "torch/optim, bitsandbytes/optim",
    "gradients": "torch/csrc/autograd/functions/accumulate_grad.h",
    "saved_activations": "tools/autograd/derivatives.yaml: what backward needs",
    "logits": "transformers/loss/loss_utils.py ForCausalLMLoss",
    "temporaries": "released before the next operation or two",
    "inputs": "the batch",
    "workspace": "aten/src/ATen/cuda/CublasHandlePool.cpp",
}


@dataclass(frozen=True, slots=True)
class Term:
    """One contribution to the peak. `formula` has its numbers filled in; the terms' bytes sum to
    the peak."""

    name: str
    category: str
    bytes: int
    instant: str
    formula: str
    source: str
    count: int = 1

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: getattr(self, name) for name in self.__slots__}


def static_terms(program: Program) -> list[Term]:
    """Parameters by component and storage, adapters, optimizer states."""
    groups: dict[tuple[str, str], list[int]] = {}
    sizes_of = program.loading.sizes
    for key, owner in program.loading.stays.items():
        groups.setdefault(owner, []).append(sizes_of[key])
    terms = []
    for (component, what), sizes in groups.items():
        category = "adapters" if component == "adapter" else "parameters"
        formula = f"{len(sizes)} tensors of {component} as {what}"
        name = f"{component} ({what})"
        terms.append(_term(name, category, sum(sizes), "the whole step", formula, len(sizes)))
    states = program.states
    if states.device_bytes:
        optimizer = program.loaded.spec.optimizer
        formula = f"{optimizer}: {len(states.tensors)} state tensors of trained parameters"
        terms.append(
            _term("optimizer states", "optimizer_states", states.device_bytes, "the whole step",
                  formula, len(states.tensors))
        )  # fmt: skip
    return terms


def live_terms(blocks: Iterable[Block], instant: str) -> list[Term]:
    """Blocks live at one instant, grouped by what they are, the layer's number left out."""
    groups: dict[tuple[str, str, str, tuple[Any, ...], str], list[Block]] = {}
    modules: dict[str, str] = {}
    for block in blocks:
        module = modules.get(block.module)
        if module is None:
            module = modules[block.module] = _LAYER.sub(r"\1.*", block.module)
        category = _category(block, module)
        key = (category, module, block.op, block.shape, block.dtype.value)
        groups.setdefault(key, []).append(block)
    terms = []
    for (category, module, op, shape, dtype), members in groups.items():
        size = sum(block.nbytes for block in members)
        dims = " x ".join(str(d) for d in shape) or "1"
        formula = f"{len(members)} x ({dims}) x {members[0].dtype.itemsize} B ({dtype})"
        terms.append(_term(f"{module}: {op}" if module else op, category, size, instant, formula,
                           len(members)))  # fmt: skip
    return sorted(terms, key=lambda term: -term.bytes)


def _category(block: Block, module: str) -> str:
    wide = module == "lm_head" or module == "loss" or module.startswith("accelerate")
    if wide and block.category in ("temporaries", "saved_activations") and len(block.shape) > 1:
        return "logits" if block.shape[-1] != 1 and block.op != "autocast" else block.category
    return block.category


def _term(name: str, category: str, size: int, instant: str, formula: str, count: int) -> Term:
    return Term(name, category, size, instant, formula, _SOURCES[category], count)
