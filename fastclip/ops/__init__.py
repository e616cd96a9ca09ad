"""Operators: one file each, holding its registration, autograd and choice of implementation."""
