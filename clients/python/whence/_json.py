"""Records as JSON."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from whence._images import Source


def dumps(record: object) -> str:
    """One JSON value; arrays become nested lists, bytes base64, numbers that JSON lacks null; images are left out."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, indent=2)


def _plain(value: object) -> Any:
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: _plain(part) for name, part in parts.items() if not isinstance(part, Source)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
