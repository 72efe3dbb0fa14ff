"""The picture encoder: a NaViT of any resolution, and its FLOPs."""
