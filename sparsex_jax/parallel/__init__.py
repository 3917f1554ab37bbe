"""Meshes of devices, how arrays lie on them, and attention over a sequence that is split."""
