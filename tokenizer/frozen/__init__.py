"""Frozen networks that training and evaluation share: LPIPS, DINOv2, Inception."""
