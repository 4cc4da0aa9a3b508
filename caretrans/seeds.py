"""Random numbers that depend on what they are for, and on nothing that happened before.

Each image of an epoch, and each forward pass, is seeded by its place in the run. So a run that was interrupted goes
on with the numbers it would have drawn, and neither the workers of a loader nor the processes of a run change them.
"""
import hashlib
import random
import struct

import numpy as np
import torch

__all__ = ['derive_seed', 'seed_everything', 'seed_sample']


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits from integers, all of which matter."""
    digest = hashlib.blake2b(struct.pack(f'<{len(numbers)}q', *numbers), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_sample(seed: int) -> None:
    """Seed what augmentation draws from: the generators of Python, NumPy and PyTorch on the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xffffffff)
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed these and the generators of all devices."""
    seed_sample(seed)
    torch.manual_seed(seed)
