"""What `build` makes at random weights against what from_pretrained makes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from planner.errors import InputError
from recipes.build import build
from recipes.models import load_config, model_class
from tests.recipes.tiny import tiny_chameleon, tiny_llama, tiny_spec

MAKERS = {"chameleon": tiny_chameleon, "llama": tiny_llama,
          "llama-tied": lambda: tiny_llama(tie_word_embeddings=True)}  # fmt: skip


def _saved(config, folder: Path) -> Path:
    model = model_class(config)._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def _layout(model: torch.nn.Module) -> dict[str, tuple]:
    layout = {
        name: (type(p).__name__, p.dtype, tuple(p.shape), p.requires_grad)
        for name, p in model.named_parameters()
    }
    layout |= {name: (b.dtype, tuple(b.shape)) for name, b in model.named_buffers()}
    return layout | {f"{n}!": type(m).__name__ for n, m in model.named_modules()}


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
def test_random_weights_equal_from_pretrained_in_layout(
    family: str, quantization: str, tmp_path: Path
) -> None:
    config = MAKERS[family]()
    spec = tiny_spec(quantization=quantization, weights_dtype="bfloat16", precision="bf16")
    made = build(spec, config=config, device="cpu")
    loaded = build(spec, config=config, device="cpu", weights=_saved(MAKERS[family](), tmp_path))
    assert _layout(made.model) == _layout(loaded.model)
    for attribute in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(made.base, attribute, None) == getattr(loaded.base, attribute, None)
    assert hasattr(made.base, "hf_quantizer") == hasattr(loaded.base, "hf_quantizer")
    rotary = made.base.model.rotary_emb
    assert torch.equal(rotary.inv_freq, loaded.base.model.rotary_emb.inv_freq)


def test_quantised_state_equals_from_pretrained(tmp_path: Path) -> None:
    spec = tiny_spec(quantization="nf4", weights_dtype="bfloat16", precision="bf16")
    made = build(spec, config=tiny_chameleon(), device="cpu")
    loaded = build(spec, config=tiny_chameleon(), device="cpu",
                   weights=_saved(tiny_chameleon(), tmp_path))  # fmt: skip

    def states(model: PreTrainedModel) -> dict:
        return {
            n: (s.nested, s.blocksize, s.quant_type, s.dtype, s.absmax.shape, s.state2.blocksize)
            for n, m in model.named_modules()
            if not hasattr(m, "base_layer")
            and (s := getattr(getattr(m, "weight", None), "quant_state", None)) is not None
        }

    assert len(states(made.base)) == 2 * 7
    assert states(made.base) == states(loaded.base)


def test_unknown_target_module_is_told() -> None:
    with pytest.raises(InputError, match=r"lora\.target_modules"):
        build(tiny_spec(lora={"target_modules": ["nowhere"]}), config=tiny_llama(), device="cpu")


def test_quantised_full_fine_tune_is_refused() -> None:
    with pytest.raises(InputError, match="method"):
        build(tiny_spec(method="full", quantization="nf4"), config=tiny_llama(), device="cpu")


def test_missing_model_is_told() -> None:
    with pytest.raises(InputError, match="model"):
        load_config("/nowhere/at/all")


def test_stock_is_prepared_and_lean_is_not() -> None:
    values = {"quantization": "nf4", "weights_dtype": "bfloat16", "precision": "bf16"}
    stock = build(tiny_spec(**values), config=tiny_chameleon(), device="cpu")
    lean = build(tiny_spec(**values, stack="lean"), config=tiny_chameleon(), device="cpu")
    assert stock.base.lm_head.weight.dtype == torch.float32
    assert lean.base.lm_head.weight.dtype == torch.bfloat16
    for built in (stock, lean):
        trained = [p for p in built.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
