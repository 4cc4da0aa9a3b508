"""Programs of Core AI, the format that follows Core ML, run by Apple's own reference executor.

It computes on Linux too, slowly, which makes it a second judge of the numbers and none of the speed.
"""
import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import List

import torch

from .config import Job
from .metadata import describe, read_class_names
from .silence import silence
from .source import Source, build_network
from .torch_program import trace_network
from .verify import ExportError, Program

__all__ = ['check', 'read', 'write']

INPUT, ENTRY = 'input_1', 'main'
SHAPE_CHANGES = ('reshape', 'transpose', 'expand_dims', 'squeeze', 'shrink_dims')


def check(job: Job) -> None:
    """Nothing to refuse."""
