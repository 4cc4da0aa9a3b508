"""Classes of data and of models, matched by name."""
import re

from timm.data import ImageNetInfo

from ..errors import DataError, list_names

__all__ = ['match_classes']

SYNSET = re.compile(r'n\d{8}')  # a class of ImageNet, by its WordNet ID


def match_classes(
        found: list[str], known: list[str] | None, num_classes: int, data: str, model: str) -> list[int] | None:
    """The model's class for each class of the data; None if they are the same classes in the same order.

    A model of 1,000 classes without names has those of ImageNet if the data name one of these; and numbers as names of
    the data, as in ImageNetV2, are the numbers of the model's classes.

    Args:
        found, known: Names of the classes of the data, and of the model if it has names.
        data, model: Their names in messages.
    Raises:
        DataError: The data have classes that the model does not know, or another number of classes without names.
    """
    if found == known:
        return None
    if known is None and num_classes == 1000 and any(SYNSET.fullmatch(name) for name in found):
        known = ImageNetInfo().label_names()
    if known is None and all(name.isascii() and name.isdigit() and int(name) < num_classes for name in found):
        known = [str(label) for label in range(num_classes)]
        found = [str(int(name)) for name in found]
    if known is None:
        if len(found) != num_classes:
            raise DataError(
                f'{data} has {len(found)} classes, {model} has {num_classes} and does not name them: use its own data.')
        return None
    labels = {name: label for label, name in enumerate(known)}
    unknown = [name for name in found if name not in labels]
    if unknown:
        raise DataError(
            f'{data} has {len(unknown)} of {len(found)} classes that {model} does not know: {list_names(unknown)}; it '
            f'knows {list_names(known, 5)}: remove the folders of these classes, or use data of its own classes.')
    if len(labels) < len(known):
        raise DataError(f'{model} has several classes of one name, so that those of {data} cannot be matched.')
    classes = [labels[name] for name in found]
    return None if classes == list(range(num_classes)) else classes
