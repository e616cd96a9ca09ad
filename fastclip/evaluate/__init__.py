"""Evaluation: zero-shot classification and retrieval, in CLIP_benchmark's result format."""
