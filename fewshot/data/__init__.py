"""Data sets, episodes and support sets. Nothing here knows a model."""
