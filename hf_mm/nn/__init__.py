"""Layers that two models or more share. Nothing here imports the rest of the package."""
