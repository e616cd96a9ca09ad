"""Training: one readable loop, exact resume, open_clip's flag names."""
