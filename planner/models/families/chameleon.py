"""Chameleon: early fusion. A LLaMA-like decoder with normalised queries and keys, and a VQ
tokenizer that turns each image into 1,024 tokens of the same vocabulary."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from planner.dtypes import DType
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.decoder import (
    DecoderGeometry,
    Defaults,
    head_module,
    layer_norm,
    read_decoder,
    stack_modules,
    weighted,
)
from planner.models.decoder_step import Decoder, head_and_loss
from planner.models.images import image_input
from planner.models.reading import Reader
from planner.models.tree import Component, Module
from planner.spec import RunSpec

AUTO_CLASS = "ChameleonForConditionalGeneration"
DEFAULTS = Defaults(
    vocab_size=65_536, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)  # fmt: skip
IMAGE_MARKS = 2  # <racm3:break> before and <eoss> after (processing_chameleon.py)
_VQ: Component = "image_tokenizer"
_QUANTIZER_FACTOR = 2  # each level but the last halves the resolution


class VqGeometry(NamedTuple):
    """The VQ tokenizer's encoder and codebook (there is no decoder in transformers' class).

    Channels at level i are base_channels x channel_multiplier[i]; `attn_resolutions` are the edges
    at which an attention block follows each residual block.
    """

    embed_dim: int
    num_embeddings: int
    double_latent: bool
    latent_channels: int
    resolution: int
    in_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    attention: bool
    dropout: float

    @property
    def latent_edge(self) -> int:
        """Edge of the grid of codes: 32 for 512 pixels."""
        edge: int = self.resolution // _QUANTIZER_FACTOR ** (len(self.channel_multiplier) - 1)
        return edge

    @property
    def codes(self) -> int:
        """Tokens the tokenizer makes of one image."""
        return self.latent_edge**2


class ChameleonGeometry(NamedTuple):
    text: DecoderGeometry
    vq: VqGeometry


def geometry(config: Mapping[str, Any]) -> ChameleonGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    text = read_decoder(reader, "chameleon", DEFAULTS, nested=False)
    bias = reader.flag("attention_bias", False)
    text = replace(
        text,
        head_dim=max(text.hidden_size // text.num_attention_heads, 1),  # the code knows no other
        qk_norm="chameleon",
        swin_norm=reader.flag("swin_norm", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )
    vq = _read_vq(reader.inner("vq_config"))
    reader.check()
    return ChameleonGeometry(text, vq)


def _read_vq(reader: Reader) -> VqGeometry:
    vq = VqGeometry(
        embed_dim=reader.size("embed_dim", 256),
        num_embeddings=reader.size("num_embeddings", 8192),
        double_latent=reader.flag("double_latent", False),
        latent_channels=reader.size("latent_channels", 256),
        resolution=reader.square("resolution", 512),
        in_channels=reader.size("in_channels", 3),
        base_channels=reader.size("base_channels", 128),
        channel_multiplier=reader.sizes("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=reader.size("num_res_blocks", 2, high=64),
        attn_resolutions=reader.sizes("attn_resolutions", ()),
        attention=reader.text("attn_type", "vanilla") == "vanilla",
        dropout=reader.number("dropout", 0.0, high=1.0),
    )
    levels = len(vq.channel_multiplier)
    if not 1 <= levels <= 16 or 0 in vq.channel_multiplier or not vq.latent_edge:
        reader.reject("channel_multiplier", "does not fit the resolution", vq.channel_multiplier)
    return vq


def modules(geometry: ChameleonGeometry) -> Iterator[Module]:
    """Modules of `ChameleonForConditionalGeneration`, in torch's order."""
    yield from stack_modules(geometry.text, "model.")
    yield from _vq_modules(geometry.vq, "model.vqmodel.")
    yield head_module(geometry.text, "model.", geometry.text.tie_word_embeddings)


def image_tokens(geometry: ChameleonGeometry, image_size: int | None) -> int:
    """1,024 codes and two marks, whatever the size: the processor crops to one resolution."""
    return geometry.vq.codes + IMAGE_MARKS


def image_features(geometry: ChameleonGeometry, image_size: int | None) -> int:
    return geometry.vq.codes


def forward(
    t: Engine, loaded: Loaded, geometry: ChameleonGeometry, batch: Batch
) -> tuple[Tensor, Tensor | None]:
    """`ChameleonForConditionalGeneration.forward`: (loss, logits)."""
    decoder = Decoder(t, loaded, geometry.text, "model.")
    if loaded.spec.stack == "lean":
        if batch.pixels is not None:
            _image_codes(t, loaded, geometry, batch.pixels)
        hidden = decoder.layers(decoder.embed(batch.ids))
        return head_and_loss(t, loaded, geometry.text, hidden, batch.labels)
    embeds = decoder.embed(batch.ids)
    features = mask = None  # names of the model's forward: alive until it returns
    if batch.pixels is not None:
        from planner.memory import vision  # loaded for images alone, as the encoder is

        features = _image_features(t, decoder, geometry, batch.pixels)
        mask = vision.placeholder_mask(t, batch.ids)
        embeds = vision.masked_scatter(t, embeds, mask, features)
    hidden = decoder.layers(embeds)
    del features, mask
    del embeds  # `inputs_embeds` lives until the backbone's forward returns
    columns = geometry.vq.num_embeddings  # one vocabulary entry a code
    return head_and_loss(t, loaded, geometry.text, hidden, batch.labels, columns)


_IMAGES_AT_ONCE = 4  # recipes.images


def _image_codes(t: Engine, loaded: Loaded, geometry: ChameleonGeometry, pixels: Tensor) -> None:
    """The lean stack's images: codes without a graph, a few at a time, put among the token ids."""
    from planner.memory.vocabulary import minimum
    from planner.models.chameleon_vq import VqEncoder

    shape = (minimum(pixels.shape[0], _IMAGES_AT_ONCE), *pixels.shape[1:])
    training, t.training = t.training, False
    with t.no_grad():
        part = t.new(shape, loaded.dtype, "to (pixels)")
        VqEncoder(t, loaded, geometry.vq, "model.vqmodel.").encode(part)
    t.training = training


def _image_features(
    t: Engine, decoder: Decoder, geometry: ChameleonGeometry, pixels: Tensor
) -> Tensor:
    """get_image_features: the embeddings of the images' codes, (N, codes, D)."""
    from planner.models.chameleon_vq import VqEncoder

    encoder = VqEncoder(t, decoder.loaded, geometry.vq, "model.vqmodel.")
    indices, _outputs = encoder.encode(pixels)  # alive until this function returns
    ids = t.new(indices.shape, DType.INT32, "to (codes, from the host)")
    return decoder.embed(ids.view((pixels.shape[0], geometry.vq.codes)))


def pixels(recorder: Recorder, geometry: ChameleonGeometry, spec: RunSpec) -> Tensor:
    """pixel_values: (B · images, 3, R, R) fp32."""
    vq = geometry.vq
    count = spec.micro_batch_size * spec.images_per_sample
    return image_input(recorder, (count, vq.in_channels, vq.resolution, vq.resolution))


def _vq_modules(vq: VqGeometry, prefix: str) -> Iterator[Module]:
    yield from _encoder_modules(vq, f"{prefix}encoder.")
    codebook = f"{prefix}quantize.embedding"
    yield weighted(codebook, "embedding", _VQ, vq.num_embeddings, vq.embed_dim)
    yield _conv(f"{prefix}quant_conv", vq.latent_channels, vq.embed_dim, 1)
    yield _conv(f"{prefix}post_quant_conv", vq.embed_dim, vq.latent_channels, 1)


def _encoder_modules(vq: VqGeometry, prefix: str) -> Iterator[Module]:
    yield _conv(f"{prefix}conv_in", vq.in_channels, vq.base_channels, 3)
    edge = vq.resolution
    multipliers = (1, *vq.channel_multiplier)
    for level in range(len(vq.channel_multiplier)):
        width_in, width = (vq.base_channels * m for m in multipliers[level : level + 2])
        down = f"{prefix}down.{level}."
        for block in range(vq.num_res_blocks):
            yield from _residual(f"{down}block.{block}.", width if block else width_in, width)
        if vq.attention and edge in vq.attn_resolutions:
            for block in range(vq.num_res_blocks):
                yield from _attention(f"{down}attn.{block}.", width)
        if level < len(vq.channel_multiplier) - 1:
            yield _conv(f"{down}downsample.conv", width, width, 3)
            edge //= _QUANTIZER_FACTOR
    yield from _residual(f"{prefix}mid.block_1.", width, width)
    if vq.attention:
        yield from _attention(f"{prefix}mid.attn_1.", width)
    yield from _residual(f"{prefix}mid.block_2.", width, width)
    yield layer_norm(f"{prefix}norm_out", _VQ, width)
    yield _conv(f"{prefix}conv_out", width, vq.latent_channels * (1 + vq.double_latent), 3)


def _residual(prefix: str, width_in: int, width: int) -> Iterator[Module]:
    yield layer_norm(f"{prefix}norm1", _VQ, width_in)
    yield _conv(f"{prefix}conv1", width_in, width, 3)
    yield layer_norm(f"{prefix}norm2", _VQ, width)
    yield _conv(f"{prefix}conv2", width, width, 3)
    if width_in != width:
        yield _conv(f"{prefix}nin_shortcut", width_in, width, 1)


def _attention(prefix: str, width: int) -> Iterator[Module]:
    yield layer_norm(f"{prefix}norm", _VQ, width)
    for name in ("q", "k", "v", "proj_out"):
        yield _conv(prefix + name, width, width, 1)


def _conv(path: str, channels_in: int, channels: int, kernel: int) -> Module:
    return weighted(path, "conv", _VQ, channels, channels_in, kernel, kernel, bias=channels)
