"""Configs shipped with the package: those of the shipped model."""
