"""Emoji in three styles: real images with captions, fetched from npm packages."""
