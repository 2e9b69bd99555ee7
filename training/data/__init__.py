"""Data sets and code shards: formats, shards, mixture, collation."""
