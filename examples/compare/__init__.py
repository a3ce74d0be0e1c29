"""What a user would pick instead, on the same data, with as many trials for every method."""
