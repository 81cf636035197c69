"""EVA's Vision Transformer (eva_vit)."""
