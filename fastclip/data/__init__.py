"""Samples in a reproducible order: shards, the embedded `scenes`, augmentation, loading."""
