"""ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2): 32×32 RGB images, ten classes, 0.27 M parameters.

Input: RGB in [0, 1] less the mean (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225): `PREPROCESSING`. ``layer3`` puts
out 64 non-negative channels on a grid of 8×8; what follows is a mean and a linear map.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from concepts.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(32, 32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _Shrink(nn.Module):
    """The shortcut without parameters ("option A"): every second row and column, channels padded by zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else _Shrink(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs, stride), _Block(outputs, outputs, 1), _Block(outputs, outputs, 1))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Build the network, without weights."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            layer1=_stage(16, 16, 1),
            layer2=_stage(16, 32, 2),
            layer3=_stage(32, 64, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(64, num_classes),
        )
    )
