"""Formats: one module for each runtime, and the table of their names, requirements and options."""
