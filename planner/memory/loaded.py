"""A model after loading and adapter set-up: each module's dtype, storage kind, adapter, and which
parameters want a gradient. Decided by walking the module tree as transformers and peft do."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planner.dtypes import F32, DType
from planner.memory.layers import Adapter, Linear
from planner.memory.outliers import OutlierModel
from planner.memory.tensor import Tensor
from planner.models.tree import ModelTree, Module
from planner.spec import RunSpec
from planner.versions import keeps_4bit_inputs

EMBEDDINGS = "embed_tokens"  # the decoder's, in every family
COMPUTE = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}


@dataclass
class Loaded:
    """What the step program asks for: linears, weights and biases by path.

    adapted: the paths with LoRA; trained: modules of the tree that are trained whole (an
    adapter of the model's own, LLaMA-Adapter's prompts); own_step: this project's recipe builds
    and runs the model, without k-bit preparation, 4-bit linears in the spec's precision;
    masked_labels: positions of a sample that are images and have no label; outliers: of 8 bits,
    how many input columns hold any.
    `leaves` keeps one leaf per parameter, so that gradients accumulate where torch's do.
    """

    spec: RunSpec
    tree: ModelTree
    adapted: frozenset[str]
    unquantized: frozenset[str] = frozenset()
    decoder_layers: int | None = None  # run only so many of them
    trained: frozenset[str] = frozenset()
    own_step: bool = False
    masked_labels: int = 0
    outliers: OutlierModel | None = None
    leaves: dict[str, Any] = field(default_factory=dict)
    _linears: dict[str, Linear] = field(default_factory=dict)

    def layer_kinds(self, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
        """The decoder layers to run."""
        return kinds if self.decoder_layers is None else kinds[: self.decoder_layers]

    @cached_property
    def positions(self) -> dict[str, int]:
        """Each module's place in the model's order."""
        return {module.path: index for index, module in enumerate(self.tree.modules)}

    @property
    def quantized(self) -> bool:
        """Whether linears are stored in 4 or 8 bits."""
        return self.spec.quantization != "none"

    @property
    def casts_to_fp32(self) -> bool:
        """Whether k-bit preparation makes the parameters that are not quantised fp32."""
        return (
            self.quantized and self.spec.stack == "stock" and self.spec.weights_dtype != "float32"
            and not self.own_step
        )  # fmt: skip

    @property
    def dtype(self) -> DType:
        """Dtype of the parameters that are not quantised."""
        if self.casts_to_fp32:
            return F32
        return DType(self.spec.weights_dtype)

    @property
    def adapter_dtype(self) -> DType:
        """peft keeps adapters in fp32 beside 16-bit weights (autocast_adapter_dtype)."""
        return F32

    @property
    def trained_dtype(self) -> DType:
        """fp32 for a model's own adapters; peft makes prompts in the dtype of q_proj's weight, and
        in fp32 where that is packed."""
        return F32 if self.own_step or self.quantized else self.dtype

    def is_quantized(self, module: Module) -> bool:
        """transformers replaces every nn.Linear but the output head and what is tied to it."""
        return (
            self.quantized and module.kind == "linear" and module.path not in self.unquantized
            and module.component != "lm_head"
        )  # fmt: skip

    def leaf(
        self, path: str, name: str, shape: tuple[Any, ...], dtype: DType, trainable: bool
    ) -> Any:
        """The parameter `path.name`, made once."""
        key = f"{path}.{name}"
        tensor = self.leaves.get(key)
        if tensor is None:
            tensor = Tensor(None, shape, dtype, requires_grad=trainable, name=key)
            self.leaves[key] = tensor
        return tensor

    def parameter(self, path: str, name: str = "weight") -> Any:
        """A plain parameter: trainable in full fine-tuning, or where its module is trained."""
        module = self.tree.by_path[path]
        owner = module.tied_to or path
        shape = dict(self.tree.by_path[owner].shapes)[name]
        if owner in self.trained:
            return self.leaf(owner, name, shape, self.trained_dtype, True)
        return self.leaf(owner, name, shape, self.dtype, self.spec.method == "full")

    def linear(self, path: str) -> Linear:
        """A linear with its storage kind and adapter."""
        state = self._linears.get(path)
        if state is None:
            state = self._linears[path] = self._build_linear(self.tree.by_path[path])
        return state

    def _build_linear(self, module: Module) -> Linear:
        out_features, in_features = module.weight_shape
        quantized = self.is_quantized(module)
        kind = self.spec.quantization
        has_bias = len(module.shapes) > 1
        return Linear(
            name=module.path,
            in_features=in_features,
            out_features=out_features,
            weight=self.leaf(
                f"{module.path}", "weight", (out_features, in_features), self.dtype, False
            )
            if quantized
            else self.parameter(module.path),
            bias=self.parameter(module.path, "bias") if has_bias else None,
            quantization="none" if not quantized else "int8" if kind == "int8" else "4bit",
            double_quant=self.spec.double_quant,
            compute_dtype=COMPUTE[self.spec.precision]
            if self.own_step
            else compute_dtype(self.spec),
            keeps_input=keeps_4bit_inputs(self.spec),
            outliers=self.outliers,
            adapter=self._adapter(module) if module.path in self.adapted else None,
        )

    def embedding_adapter(self, path: str) -> Adapter | None:
        """LoRA on an embedding: A a table of `rank` rows, one column a token."""
        if path not in self.adapted:
            return None
        rows, width = self.tree.by_path[path].weight_shape
        rank, dtype = self.spec.lora.rank, self.adapter_dtype
        return Adapter(
            a=self.leaf(path, "lora_embedding_A", (rank, rows), dtype, True),
            b=self.leaf(path, "lora_embedding_B", (width, rank), dtype, True),
            dropout=0.0,
        )

    def _adapter(self, module: Module) -> Adapter:
        out_features, in_features = module.weight_shape
        rank, dtype = self.spec.lora.rank, self.adapter_dtype
        return Adapter(
            a=self.leaf(module.path, "lora_A.weight", (rank, in_features), dtype, True),
            b=self.leaf(module.path, "lora_B.weight", (out_features, rank), dtype, True),
            dropout=self.spec.lora.dropout,
        )


def compute_dtype(spec: RunSpec) -> DType:
    """bnb_4bit_compute_dtype of the reference workload: the dtype of the weights."""
    return DType(spec.weights_dtype)
