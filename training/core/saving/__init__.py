"""Parts of checkpoints: files and their hashes, writing in the background, other numbers of ranks."""
