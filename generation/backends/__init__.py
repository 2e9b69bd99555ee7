"""Decoding backends: eager torch, CUDA graph, compiled C++."""
