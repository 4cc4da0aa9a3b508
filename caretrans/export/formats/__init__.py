"""Formats: one module for each runtime, and the table of what they are called, need and allow."""
