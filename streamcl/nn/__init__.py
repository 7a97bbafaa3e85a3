"""What strategies share: the model, backbones, heads, losses."""
