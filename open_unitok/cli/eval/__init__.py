"""`unitok eval ...`: benchmarks."""
