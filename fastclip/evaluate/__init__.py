"""Evaluation of any model on published benchmarks, in CLIP_benchmark's result format."""
