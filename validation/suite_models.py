"""Networks of the replay suite that a CPU runs in a fraction of a second: the architectures of `simulator.models`, few layers, small inputs.

Plain torch, so that a bare machine builds them too.
"""

from __future__ import annotations

from torch import Tensor, nn

from simulator.models.fno import fno2d
from simulator.models.gpt import Decoder
from simulator.models.losses import image_inputs, token_inputs
from simulator.models.resnet import ResNet
from simulator.models.unet import unet2d
from simulator.models.vit import VisionTransformer

Made = tuple[nn.Module, dict[str, Tensor]]
VOCAB, CLASSES, FIELD_POINTS, IMAGE_POINTS = 2048, 100, 48, 64


def gpt(batch: int = 8, seq_len: int = 128) -> Made:
    """Six layers, 256 wide."""
    module = Decoder(layers=6, hidden=256, heads=4, ffn=1024, vocab=VOCAB, max_positions=seq_len)
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=VOCAB)


def llama(batch: int = 8, seq_len: int = 128) -> Made:
    """Six layers, 256 wide, four heads over two key-value heads."""
    module = Decoder(layers=6, hidden=256, heads=4, kv_heads=2, ffn=768, vocab=VOCAB, max_positions=seq_len, llama=True)
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=VOCAB)


def vit(batch: int = 8) -> Made:
    """Six layers, 192 wide, 112 x 112 points."""
    module = VisionTransformer(size=112, hidden=192, layers=6, heads=3)
    return module, image_inputs(batch=batch, size=112, num_classes=1000)


def fno(batch: int = 8) -> Made:
    """The two-dimensional one on 48 x 48 points."""
    return fno2d(batch=batch, size=FIELD_POINTS)


def resnet(batch: int = 8) -> Made:
    """Ten layers on 64 x 64 points."""
    return ResNet(depths=(1, 1, 1, 1), bottleneck=False), image_inputs(batch=batch, size=IMAGE_POINTS, num_classes=CLASSES)


def unet(batch: int = 2) -> Made:
    """On 64 x 64 points."""
    return unet2d(batch=batch, size=IMAGE_POINTS)
