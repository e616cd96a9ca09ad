"""Contrastive losses as modules, with the signatures people already use."""
