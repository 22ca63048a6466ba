"""Learns concept banks from images and freezes them: the ``whence-bank`` command."""
