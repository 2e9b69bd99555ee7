"""The harness: running, resuming, records, results, bootstrap intervals."""
