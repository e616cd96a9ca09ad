"""Layers that the systems add to towers from elsewhere."""
