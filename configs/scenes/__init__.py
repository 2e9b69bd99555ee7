"""Configs shipped with the package: the model that ships with it."""
