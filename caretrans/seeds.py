"""Random seeds that depend only on what they are for, not on what was drawn before.

Each image of an epoch and each forward pass is seeded by its place in the run. A resumed run therefore draws the same
numbers as an uninterrupted one, whatever the number of loader workers and processes.
"""
import hashlib
import random
import struct

import numpy as np
import torch

__all__ = ['derive_seed', 'seed_everything', 'seed_sample']


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all of `numbers`."""
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_sample(seed: int) -> None:
    """Seed the generators that augmentation uses: Python, NumPy and PyTorch on the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xffffffff)
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed the generators of `seed_sample` and the generators of all devices."""
    seed_sample(seed)
    torch.manual_seed(seed)
