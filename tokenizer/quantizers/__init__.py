"""Quantisers: latents to codes and back."""
