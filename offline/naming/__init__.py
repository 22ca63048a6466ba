"""Words for concepts: from CLIP embeddings of their exemplars and counterfactuals, and a vocabulary."""

from offline.naming.naming import Names, labelled, name_concepts
from offline.naming.scores import Evidence
from offline.naming.settings import NamingSettings

__all__ = ["Evidence", "Names", "NamingSettings", "labelled", "name_concepts"]
