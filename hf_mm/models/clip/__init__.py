"""CLIP (mm_clip)."""
