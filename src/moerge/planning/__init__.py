"""Plans: what will be done to every output tensor, and doing it."""
