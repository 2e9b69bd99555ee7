"""Emoji in up to three styles: real images with captions, fetched from npm packages."""
