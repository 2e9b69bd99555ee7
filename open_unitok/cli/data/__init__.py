"""`unitok data ...`: make and check data sets."""
