"""Models, one folder per model type."""
