"""Small CLIPs with random weights, as open_clip saves models."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from open_clip.model import CLIP

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def random_clip(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Save a CLIP that tells all texts apart; return its folder."""
    config = {**CONFIG, "embed_dim": width}
    torch.manual_seed(seed)
    module = CLIP(**config)
    with torch.no_grad():
        module.token_embedding.weight.normal_()
        module.token_embedding.weight[-1] = 0  # the end of a text, where it is read: what comes before decides
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    safetensors.torch.save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    return folder
