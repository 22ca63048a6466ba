"""The small networks that the demo explains: architectures alone, their weights lie in `demo/weights`.

Each factory can be named to `concepts.architectures.build`, e.g. ``demo.networks:cnn``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

from bcos.common import BcosUtilMixin
from bcos.modules import BcosConv2d, LogitLayer, norms
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

IMAGE_SIDE = 64
"""Height and width of the images the networks take, in pixels."""


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def cnn(num_classes: int) -> nn.Module:
    """Build a convolutional network with ReLU, for RGB images of 64×64.

    Its last block, ``stage3``, has 96 non-negative channels on a grid of 16×16 (each cell sees 61×61 pixels); what
    follows is a mean and a linear map, so that logits are affine in it. ``stage2`` has 64 channels on the same grid.
    """
    return nn.Sequential(
        OrderedDict(
            stem=_conv(3, 24, kernel=5, stride=2),
            stage1=_conv(24, 32),
            stage2=nn.Sequential(_conv(32, 64, stride=2), _conv(64, 64)),
            stage3=nn.Sequential(_conv(64, 64), _conv(64, 96)),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(96, num_classes),
        )
    )


class BcosCnn(BcosUtilMixin, nn.Module):  # type: ignore[misc]
    """A convolutional B-cos network (Böhle et al., B-cos v2, 2023) for RGB images of 64×64 with their inverse.

    Bias-free throughout but for the constant of `logit_layer`: in explanation mode each logit less that constant is
    linear in the input, with weights that depend on the input.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = _bcos_conv(6, 24, kernel=5, stride=2)
        self.stage1 = _bcos_conv(24, 32)
        self.stage2 = nn.Sequential(_bcos_conv(32, 64, stride=2), _bcos_conv(64, 64))
        self.stage3 = nn.Sequential(_bcos_conv(64, 64), _bcos_conv(64, 96))
        self.head = BcosConv2d(96, num_classes, kernel_size=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        # Binary cross-entropy starts from the odds of one class among many, as in the package's own models. The
        # temperature makes up for the mean over positions, most of which say nothing of a small object.
        self.logit_layer = LogitLayer(logit_temperature=0.1, logit_bias=-math.log(num_classes - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, 6, 64, 64]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.logit_layer(self.flatten(self.pool(self.head(x))))
        return logits


def _bcos_conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """B-cos convolution and the package's normalisation over channels, without bias: dynamic-linear as a pair."""
    return nn.Sequential(
        BcosConv2d(inputs, outputs, kernel_size=kernel, stride=stride, padding=kernel // 2),
        norms.NoBias(norms.DetachablePositionNorm2d)(outputs),
    )


def bcos(num_classes: int) -> nn.Module:
    """Build `BcosCnn`: its last block, ``stage3``, has 96 signed channels on a grid of 16×16."""
    return BcosCnn(num_classes)


def vit(num_classes: int) -> nn.Module:
    """Build torchvision's vision transformer for RGB images of 64×64, with a ReLU in its stream of tokens.

    A convolutional stem makes 8×8 tokens of 96 channels beside the class token; three blocks, then
    ``encoder.layers.relu``, whose non-negative tokens can be factorised, then one last block, through which alone the
    class token sees them again.
    """
    network: nn.Module = VisionTransformer(
        image_size=IMAGE_SIDE,
        patch_size=8,
        num_layers=4,
        num_heads=4,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=num_classes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        conv_stem_configs=[
            ConvStemConfig(24, kernel_size=5, stride=2),
            ConvStemConfig(48, kernel_size=3, stride=2),
            ConvStemConfig(64, kernel_size=3, stride=1),
            ConvStemConfig(96, kernel_size=3, stride=2),
        ],
    )
    encoder = network.get_submodule("encoder")
    blocks = list(encoder.get_submodule("layers").named_children())
    blocks.insert(len(blocks) - 1, ("relu", nn.ReLU()))
    encoder.layers = nn.Sequential(OrderedDict(blocks))
    return network
