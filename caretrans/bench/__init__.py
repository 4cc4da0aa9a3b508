"""Measure networks: counts, latency, memory, accuracy, profiles, roofline and training steps."""
