"""`unitok data ...`: render, convert and check data sets."""
