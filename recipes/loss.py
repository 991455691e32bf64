"""Linear and cross-entropy in one, a chunk of rows at a time: the logits never exist whole.

Equal to the head followed by transformers' `ForCausalLMLoss`: the sum over predicted tokens of
-log softmax(h W')[label], over `count`. The gradient of a chunk is made where its logits are, in
the forward, so that backward is a scaling. Chameleon's image columns, which its forward sets to
finfo.min, are left out of the softmax in the same way; Gemma's soft cap is applied in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from planner.errors import UnsupportedError
from recipes.dropout import add_branch, down_gradient, up_projection

CHUNK_BYTES = 1 << 27


@dataclass(frozen=True, slots=True)
class Head:
    """The output embedding as the loss sees it. weight (V, H); a (r, H) and b (V, r): its adapter;
    excluded: bool (V,), columns that the model masks; softcap: logits become c*tanh(x/c)."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    excluded: Tensor | None = None
    softcap: float | None = None


def head_of(base: PreTrainedModel) -> Head:
    """The head of a model, its adapter included. Raises UnsupportedError for one that scales its
    logits in a way that is not known here."""
    config = base.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedError(f"{base.config.model_type}: the lean loss knows no {name}")
    module = base.get_output_embeddings()
    linear = getattr(module, "base_layer", module)
    if getattr(linear, "bias", None) is not None:
        raise UnsupportedError(f"{base.config.model_type}: the lean loss knows no head with bias")
    return Head(
        weight=linear.weight,
        excluded=_excluded(base, linear.weight),
        softcap=getattr(config, "final_logit_softcapping", None),
        **_adapter(module),
    )


def predicted_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (B, S), -100 ignored -> (positions, targets): flat positions in (B*S) whose next
    token is predicted, and that token. On CPU labels it costs no device synchronisation."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    positions = torch.nonzero(shifted != -100).squeeze(1)
    return positions, shifted[positions]


def linear_cross_entropy(
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    head: Head,
    count: Tensor | int,
    *,
    seed: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum of -log p over `positions`, over `count`: a 0-d fp32 tensor.

    hidden (..., H); positions (P,) into its flattened rows; targets (P,). seed: int32 0-d, for
    the adapter's dropout; None switches it off. Gradients reach hidden, the adapter, and the
    weight where it is trained.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = max(1, min(len(positions), chunk_bytes // (head.weight.shape[0] * flat.element_size())))
    return _LinearCrossEntropy.apply(
        flat, head.weight, head.a, head.b, positions, targets, head, float(count), seed, rows
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None,
        positions: Tensor, targets: Tensor, head: Head, count: float, seed: Tensor | None,
        rows: int,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad[:4] if any(ctx.needs_input_grad[:4]) else (False,) * 4
        grads = _zeros(wanted, flat, weight, a, b)
        loss = torch.zeros((), dtype=torch.float32, device=flat.device)
        scale = torch.full_like(loss, 1 / count)  # a tensor: a number would recompile each step
        for index, start in enumerate(range(0, len(positions), rows)):
            where, target = positions[start : start + rows], targets[start : start + rows]
            chunk_seed = None if seed is None else seed + index
            loss += _chunk(flat[where], where, target, head, scale, chunk_seed, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype if t is not None else None for t in (flat, weight, a, b)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scaled = [
            None if g is None else g.mul_(grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def _zeros(
    wanted: tuple[bool, ...], flat: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None
) -> list[Tensor | None]:
    """Gradient buffers: hidden's in its dtype (each row is written once), the others, summed over
    chunks, in fp32."""
    grads: list[Tensor | None] = [torch.zeros_like(flat) if wanted[0] else None]
    for tensor, needed in zip((weight, a, b), wanted[1:], strict=True):
        made = needed and tensor is not None
        grads.append(torch.zeros_like(tensor, dtype=torch.float32) if made else None)  # type: ignore[arg-type]
    return grads


def _chunk(
    hidden: Tensor, where: Tensor, target: Tensor, head: Head, scale: Tensor,
    seed: Tensor | None, grads: list[Tensor | None],
) -> Tensor:  # fmt: skip
    """One chunk's share of the loss; adds its gradients into `grads`."""
    logits, up = hidden @ head.weight.to(hidden.dtype).t(), None
    if head.a is not None and head.b is not None:
        up = up_projection(hidden, head.a.to(hidden.dtype), seed, head.dropout)
        logits.addmm_(up, head.b.to(hidden.dtype).t(), alpha=head.scaling)
    kernel = _entropy_kernel(logits.is_cuda, head.softcap, any(g is not None for g in grads))
    loss, grad = kernel(logits, target, head.excluded, scale)
    if grad is not None:
        del logits
        _accumulate(grad, hidden, up, where, head, seed, grads)
    return loss


def _accumulate(
    grad: Tensor, hidden: Tensor, up: Tensor | None, where: Tensor, head: Head,
    seed: Tensor | None, grads: list[Tensor | None],
) -> None:  # fmt: skip
    d_hidden, d_weight, d_a, d_b = grads
    d_up = None
    if up is not None and head.b is not None:
        d_up = (grad @ head.b.to(grad.dtype)).mul_(head.scaling)
        if d_b is not None:
            d_b.add_((grad.t() @ up).float(), alpha=head.scaling)
        if d_a is not None:
            d_a.add_(down_gradient(d_up, hidden, seed, head.dropout))
    if d_weight is not None:
        d_weight.add_((grad.t() @ hidden).float())
    if d_hidden is None:
        return
    rows = grad @ head.weight.to(grad.dtype)
    if d_up is not None and head.a is not None:
        rows = add_branch(rows, d_up, head.a.to(grad.dtype), seed, head.dropout)
    d_hidden.index_copy_(0, where, rows)


@cache
def _entropy_kernel(compiled: bool, softcap: float | None, with_grad: bool) -> Any:
    def entropy(
        logits: Tensor, target: Tensor, excluded: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        z = logits.float()
        if softcap:
            bend = torch.tanh(z / softcap)
            z = bend * softcap
        if excluded is not None:
            z = torch.where(excluded, torch.finfo(logits.dtype).min, z)
        total = torch.logsumexp(z, dim=-1, keepdim=True)
        picked = z.gather(1, target[:, None])
        loss = (total - picked).sum() * scale
        if not with_grad:
            return loss, None
        columns = torch.arange(z.shape[1], device=z.device)
        grad = (torch.exp(z - total) - (columns == target[:, None]).float()) * scale
        if excluded is not None:
            grad = torch.where(excluded, 0.0, grad)
        if softcap:
            grad = grad * (1 - bend * bend)
        return loss, grad.to(logits.dtype)

    return torch.compile(entropy, dynamic=True) if compiled else entropy


def _excluded(base: PreTrainedModel, weight: Tensor) -> Tensor | None:
    mapping = getattr(getattr(base, "model", None), "vocabulary_mapping", None)
    if base.config.model_type != "chameleon" or mapping is None:
        return None
    excluded = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    excluded[torch.tensor(mapping.image_tokens, device=weight.device)] = True
    return excluded


def _adapter(module: Any) -> dict[str, Any]:
    adapters = getattr(module, "lora_A", None)
    if not adapters:
        return {}
    name = next(iter(adapters))
    return {
        "a": adapters[name].weight,
        "b": module.lora_B[name].weight,
        "scaling": module.scaling[name],
        "dropout": float(getattr(module.lora_dropout[name], "p", 0.0)),
    }
