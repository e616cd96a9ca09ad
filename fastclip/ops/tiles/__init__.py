"""What happens inside a tile of S, by implementation."""
