"""Vision Transformer (mm_vit)."""
