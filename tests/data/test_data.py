"""Data sets: opened by folder, tar or name; refused if they cannot be used."""
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from photos import FRUIT, copy_images
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from caretrans.checkpoint.preparation import Preparation, resolve_eval_config
from caretrans.data import check_labels, describe_classes, find_labels, list_classes, name_image, open_dataset
from caretrans.data.loaders import build_eval_loader
from caretrans.errors import DataError


@pytest.fixture
def small_data(tmp_path) -> Path:
    return copy_images(tmp_path, per_class=3)


def test_the_bundled_images_are_complete():
    train, val = open_dataset(FRUIT, 'train'), open_dataset(FRUIT, 'val')
    assert (len(train), len(val)) == (732, 661)
    assert list_classes(train) == list_classes(val) and len(list_classes(val)) == 14


def test_a_split_is_found_under_its_synonyms_and_by_itself(small_data):
    (small_data / 'val').rename(small_data / 'validation')
    assert len(open_dataset(small_data, 'val')) == len(open_dataset(small_data / 'validation', 'val')) == 6


def test_a_tar_of_images_is_read(small_data, tmp_path):
    with tarfile.open(tmp_path / 'photos.tar', 'w') as archive:
        archive.add(small_data / 'val', arcname='.')
    dataset = open_dataset(tmp_path / 'photos.tar', 'val')
    assert len(dataset) == 6 and list_classes(dataset) == ['kaiser', 'orange']


def test_a_tar_per_split_is_found_and_one_tar_is_not_trained_on(small_data):
    for split in ('train', 'val'):
        with tarfile.open(small_data / f'{split}.tar', 'w') as archive:
            archive.add(small_data / split, arcname='.')
        shutil.rmtree(small_data / split)
        assert len(open_dataset(small_data, split)) == 6
    with pytest.raises(DataError, match='training needs a folder with train.tar and val.tar'):
        open_dataset(small_data / 'train.tar', 'train', is_training=True)


def test_a_data_set_of_the_factory_is_read_by_name(small_data):
    dataset = open_dataset(small_data, 'val', name='torch/image_folder')
    assert len(dataset) == 6 and list_classes(dataset) == ['kaiser', 'orange']


def break_missing(root): shutil.rmtree(root)  # noqa: E704
def break_no_split(root): shutil.rmtree(root / 'val')  # noqa: E704
def break_flat(root): [shutil.move(p, root / 'val' / p.name) for p in root.glob('val/*/*.jpg')]  # noqa: E704
def break_no_images(root): [p.unlink() for p in root.glob('val/*/*.jpg')]  # noqa: E704
def break_other_class(root): (root / 'val' / 'kaiser').rename(root / 'val' / 'conference')  # noqa: E704


@pytest.mark.parametrize('damage, message', [
    (break_missing, 'No data at '),
    (break_no_split, "has no folder 'val', but train"),
    (break_flat, 'has no images in class folders.*images outside of class folders: 6'),
    (break_no_images, 'has no images'),
    (break_other_class, r'missing kaiser; unknown conference'),
])
def test_data_that_cannot_be_evaluated_is_refused(small_data, damage, message):
    damage(small_data)
    with pytest.raises(DataError, match=message) as error:
        open_dataset(small_data, 'val', classes=['kaiser', 'orange'])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, message', [
    ('torch/cifar10', "holds no complete copy of torch/cifar10: --dataset-download fetches it"),
    ('torch/nonsense', "cannot be read: Unknown torchvision dataset nonsense"),
])
def test_a_missing_data_set_of_the_factory_is_refused(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, 'val', name=name)


def test_evaluation_prepares_images_as_published():
    config = resolve_eval_config(timm.create_model('care_s0'))
    assert config == Preparation(
        input_size=(3, 224, 224), interpolation='bicubic', crop_pct=0.875, crop_mode='center',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, channel_order='rgb', orientation='ignore')

    dataset = open_dataset(FRUIT, 'val')
    path, label = dataset.reader.samples[5]
    batch, labels = next(build_eval_loader(dataset, config, 6, 0).run())
    image = center_crop(resize(Image.open(path), 256, interpolation=3), 224)  # 3: bicubic; 224 / 0.875 = 256
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    assert torch.allclose(batch[5], (pil_to_tensor(image) / 255 - mean) / std, atol=1e-6)
    assert labels[5] == label


def test_labels_beyond_the_classes_of_the_model_are_refused_before_training(small_data):
    with tarfile.open(small_data / 'photos.tar', 'w') as archive:
        archive.add(small_data / 'val', arcname='.')
    for dataset in (
            open_dataset(small_data, 'val'), open_dataset(small_data / 'photos.tar', 'val'),
            open_dataset(small_data, 'val', name='torch/image_folder')):
        assert find_labels(dataset) == {0, 1}
        check_labels(dataset, 2)
        with pytest.raises(DataError, match='has 1 classes, labels 0 to 0, but the data has 1: give the number'):
            check_labels(dataset, 1)


def test_images_are_named_by_path_in_folders_and_tars(small_data):
    with tarfile.open(small_data / 'photos.tar', 'w') as archive:
        archive.add(small_data / 'val', arcname='.')
    first = sorted((small_data / 'val' / 'kaiser').iterdir())[0]
    assert name_image(open_dataset(small_data, 'val'), 0) == str(first)
    assert name_image(open_dataset(small_data, 'val', name='torch/image_folder'), 0) == str(first)
    tarred = name_image(open_dataset(small_data / 'photos.tar', 'val'), 0)
    assert tarred == f'{small_data}/photos.tar:./kaiser/{first.name}'


def test_classes_are_named_for_people():
    assert describe_classes(None, 1000)[0].startswith('tench')
    assert describe_classes(['n01440764', 'kaiser'], 2)[0].startswith('tench')
    assert describe_classes(['n01440764', 'kaiser'], 2)[1] == 'kaiser'
    assert describe_classes(None, 3) == ['0', '1', '2']
