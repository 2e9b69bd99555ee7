"""Configs shipped with the package: the model `emoji`."""
