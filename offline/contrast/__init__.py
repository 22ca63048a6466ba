"""Learning contrast banks, and looking for features that a model should not rely on."""
