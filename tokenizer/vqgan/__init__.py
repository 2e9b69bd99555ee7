"""VQGAN's convolutional encoder and decoder, and published checkpoints that have them."""
