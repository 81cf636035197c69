"""Reading published checkpoints: safe readers, tables of names that run both ways, strict accounting."""
