"""Why one class and not another: hyperplanes between classes in activation space (Herdt et al., 2025)."""
