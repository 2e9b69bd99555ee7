"""Encoders: pixels to latents."""
