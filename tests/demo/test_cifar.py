"""ResNet-20 with the weights others trained, on real images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.cifar import CLASS_NAMES, PREPROCESSING, resnet20
from tests.data import real_data


def test_resnet20_is_the_network_its_weights_were_trained_in() -> None:
    folder = real_data() / "cifar10"
    network = resnet20().eval()
    network.load_state_dict(load_file(folder / "resnet20.safetensors"), strict=True)
    activations: list[torch.Tensor] = []
    network.get_submodule("layer3").register_forward_hook(lambda *args: activations.append(args[2]))
    right = 0
    for label, name in enumerate(CLASS_NAMES):
        paths = sorted((folder / "test" / name).glob("*.jpg"))[:60]
        views = np.stack([PREPROCESSING.fit(Image.open(path).convert("RGB"))[0] for path in paths])
        with torch.inference_mode():
            right += int((network(PREPROCESSING.normalize(torch.from_numpy(views))).argmax(1) == label).sum())
    # About 81 % on all of these JPEGs; 600 of them are within 5 points of it.
    assert 0.76 <= right / 600 <= 0.87
    assert activations[0].shape[1:] == (64, 8, 8)
    assert min(float(a.min()) for a in activations) >= 0


def test_class_names_are_the_folders() -> None:
    assert tuple(sorted(path.name for path in (real_data() / "cifar10" / "test").iterdir())) == CLASS_NAMES
