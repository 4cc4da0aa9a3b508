"""The bundled images, and small excerpts of them."""
import shutil
from pathlib import Path

FRUIT = Path(__file__).parent.parent / 'data' / 'fruit14'


def copy_images(root: Path, per_class: int) -> Path:
    """Two classes of `per_class` images each, for training and for validation, in the layout of ImageNet."""
    for split in ('train', 'val'):
        for name in ('kaiser', 'orange'):
            (root / split / name).mkdir(parents=True)
            for image in sorted((FRUIT / split / name).glob('*.jpg'))[:per_class]:
                shutil.copy(image, root / split / name)
    return root
