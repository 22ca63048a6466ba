"""The domain: what a concept bank is, and how it explains a prediction."""
