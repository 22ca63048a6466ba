"""Trains sparse autoencoders: TopK (FaCT, arXiv 2510.25512), BatchTopK and JumpReLU, by sparse arithmetic."""
