"""Measure networks: what they hold, how fast they run and train in each way, and what bounds them."""
