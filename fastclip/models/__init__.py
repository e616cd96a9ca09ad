"""Models: towers from open_clip, timm and transformers, and what the papers add to them."""
