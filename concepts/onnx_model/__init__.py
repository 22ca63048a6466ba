"""Classifiers from ONNX files, as torch networks."""
