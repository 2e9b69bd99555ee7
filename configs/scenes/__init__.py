"""Configs shipped with the package: demo runs."""
