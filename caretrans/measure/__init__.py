"""Counts, timing and sample networks, shared by benchmarks and exports."""
from .counts import KINDS, Operations, count_operations, count_parameters, list_parts, make_empty

__all__ = ['KINDS', 'Operations', 'count_operations', 'count_parameters', 'list_parts', 'make_empty']
