"""The networks; importing this package registers them with timm."""
from .care import CareTransformer, linear_attention

__all__ = ['CareTransformer', 'linear_attention']
