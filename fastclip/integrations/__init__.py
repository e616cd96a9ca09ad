"""Putting fastclip's parts under other libraries' models and losses."""
