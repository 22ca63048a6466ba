"""Non-negative matrix factorisation, many at once: ``min ½‖A − UW‖² + penalties`` over ``U, W ≥ 0``.

``factorise`` and ``best_of`` take matrices of one shape, ``factorise_all`` any number of any lengths,
``factorise_stream`` one that does not fit into memory.
"""

from __future__ import annotations

from offline.nmf.descent import Factorisation, projected_gradient
from offline.nmf.many import best_of, factorise, factorise_all
from offline.nmf.penalties import Penalties
from offline.nmf.starts import Start
from offline.nmf.streaming import Streamed, factorise_stream

__all__ = [
    "Factorisation",
    "Penalties",
    "Start",
    "Streamed",
    "best_of",
    "factorise",
    "factorise_all",
    "factorise_stream",
    "projected_gradient",
]
