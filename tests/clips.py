"""CLIPs with random weights, so small that they are made and loaded in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from open_clip.model import CLIP

from concepts.clip import Clip, open_clip_model

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path, seed: int = 0) -> Clip:
    """Write a CLIP of random weights into a folder as open_clip saves models, and open it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = CLIP(**CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    safetensors.torch.save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    return open_clip_model(str(folder))
