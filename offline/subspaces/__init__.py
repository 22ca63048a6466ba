"""Groups of features that mean something together (FALCON, arXiv 2307.10504): found, shown and judged."""
