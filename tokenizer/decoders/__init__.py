"""Pixel decoders: latents to pixels."""
