"""Training data of detectors and segmenters: exact boxes and masks, seeds, odd and broken data."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_folders import annotation, write_coco, write_masks
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.utils.data import DataLoader

import caretrans
from caretrans.__main__ import main as caretrans_main
from caretrans.data.samples import Sample
from caretrans.dense.anchors import check_targets
from caretrans.dense.coco import CocoImage, encode_masks, read_coco
from caretrans.dense.masks import check_masks, read_masks
from caretrans.dense.objects import select_training
from caretrans.dense.samples import DetectionSamples, SegmentationSamples, collate
from caretrans.dense.transforms import DenseAugment, build_transform
from caretrans.errors import ConfigError, DataError
from caretrans.seeds import seed_sample

DATA = Path(caretrans.__file__).parent.parent / 'data'
PLAIN = DenseAugment((64,), 1000, hflip=0.)
BOX = [10, 4, 30, 24]
TASKS = ('objects', 'labels')


def make_sample(height: int = 40, width: int = 80) -> tuple:
    """Red is the column, green the row, blue 255 inside of the one object, whose mask fills its box."""
    left, top, right, bottom = BOX
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = torch.arange(width), torch.arange(height)[:, None]
    image[2, top:bottom, left:right] = 255
    masks = (image[2:] == 255).to(torch.uint8)
    return image, dict(boxes=torch.tensor([BOX]).float(), labels=torch.tensor([3]), masks=masks)


def augment(seed: int = 0, sample: tuple | None = None, **settings) -> tuple:
    options = dict(min_sizes=(40,), max_size=1000, hflip=0.)
    transform = build_transform(DenseAugment(**{**options, **settings}))
    seed_sample(seed)
    return transform(*(sample or make_sample()))


# Augmentation ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, box', [
    (dict(), [10, 4, 30, 24]),
    (dict(hflip=1.), [50, 4, 70, 24]),
    (dict(vflip=1.), [10, 16, 30, 36]),
    (dict(hflip=1., vflip=1.), [50, 16, 70, 36]),
    (dict(min_sizes=(80,)), [20, 8, 60, 48]),
    (dict(min_sizes=(20,)), [5, 2, 15, 12]),
    (dict(min_sizes=(80,), max_size=120), [15, 6, 45, 36]),
    (dict(scale=(2., 2.), hflip=1.), [100, 8, 140, 48])])
def test_boxes_and_masks_follow_flips_and_sizes(settings, box):
    image, target = augment(**settings)
    assert image.dtype == torch.uint8 and target['boxes'].tolist() == [box] and target['labels'].tolist() == [3]
    expected = torch.zeros(image.shape[-2:], dtype=torch.uint8)
    expected[box[1]:box[3], box[0]:box[2]] = 1
    assert torch.equal(target['masks'], expected[None])
    inside = torch.nn.functional.max_pool2d(1. - expected[None], 3, 1, 1)[0] == 0  # without the blurred edge
    assert (image[2][inside] == 255).all()
    assert all(type(x) is torch.Tensor for x in (image, *target.values()))


def test_sizes_are_rounded_as_in_mmdet():
    """41 / 33 x 50 = 62.1; 45 / 33 x 50 = 68.2; 41 / 33 x 51 = 63.4; 42 / 33 x 51 = 64.9."""
    for width, short, expected in ((50, 41, 62), (50, 45, 68), (51, 41, 63), (51, 42, 65)):
        image, target = augment(sample=make_sample(33, width), min_sizes=(short,))
        assert image.shape == (3, short, expected)
        scales = torch.tensor([expected / width, short / 33] * 2)
        assert torch.allclose(target['boxes'], torch.tensor([BOX]) * scales)


def test_sizes_are_drawn_from_the_list_and_the_range():
    seen = {tuple(augment(i, min_sizes=(20, 40, 60))[0].shape[1:]) for i in range(30)}
    assert seen == {(20, 40), (40, 80), (60, 120)}
    heights = [augment(i, scale=(.5, 2.))[0].shape[1] for i in range(200)]
    assert min(heights) < 24 and max(heights) > 76 and set(heights) <= set(range(20, 81))


def test_crops_move_boxes_and_drop_objects_outside():
    kept = 0
    for seed in range(60):
        image, target = augment(seed, crop_size=24)
        left, top = int(image[0, 0, 0]), int(image[1, 0, 0])
        assert image.shape == (3, 24, 24) and image[0, 0, -1] == left + 23 and image[1, -1, 0] == top + 23
        box = [max(BOX[0] - left, 0), max(BOX[1] - top, 0), min(BOX[2] - left, 24), min(BOX[3] - top, 24)]
        visible = box[2] - box[0] >= 1 and box[3] - box[1] >= 1
        assert target['boxes'].tolist() == [box] * visible and target['labels'].tolist() == [3] * visible
        assert torch.equal(target['masks'], (image[2:] == 255).to(torch.uint8)[:int(visible)])
        kept += visible
    assert 10 < kept < 55
    image, target = augment(crop_size=60)
    assert image.shape == (3, 40, 60)  # the lower side stays


def test_objects_below_a_pixel_are_dropped_with_their_labels_and_masks():
    image, target = make_sample()
    boxes = torch.tensor([[1, 1, 2.5, 30], [10, 4, 30, 24], [40, 4, 60, 5.9]])
    target = dict(boxes=boxes, labels=torch.tensor([0, 1, 2]), masks=torch.arange(3, dtype=torch.uint8)
                  [:, None, None].expand(3, 40, 80).contiguous())
    target = augment(sample=(image, target), min_sizes=(20,))[1]
    assert target['labels'].tolist() == [1] and target['masks'].unique().tolist() == [1]
    assert target['boxes'].tolist() == [[5, 2, 15, 12]]


def test_detr_crops_half_of_the_time():
    image, target = make_sample()
    whole, shapes = 0, []
    for seed in range(40):
        pixels, found = augment(seed, (image, target), min_sizes=(480,), max_size=1333, detr_crop=True)
        shapes.append(pixels.shape[1:])
        whole += shapes[-1] == (480, 960)
        if len(found['boxes']):  # the mask still fills its box
            left, top, right, bottom = found['boxes'][0].tolist()
            area = (right - left) * (bottom - top)
            assert abs(found['masks'].sum() / area - 1) < .1 or area < 400
    assert 8 < whole < 32 and len(set(shapes)) > 8 and max(map(max, shapes)) <= 1333


def test_label_maps_keep_their_values():
    labels = torch.full((40, 80), 255, dtype=torch.uint8)
    labels[:, :40], labels[10:20] = 0, 7
    for seed in range(20):
        image, found = augment(
            seed, (make_sample()[0], labels), scale=(.5, 2.), crop_size=32, hflip=.5, vflip=.5, photometric=True)
        assert found.dtype == torch.uint8 and found.shape == image.shape[1:] == torch.Size(
            [min(side, 32) for side in found.shape]) and set(found.unique().tolist()) <= {0, 7, 255}
    found = augment(0, (make_sample()[0], labels), min_sizes=(80,), hflip=1.)[1]
    assert torch.equal(found, labels.flip(1).repeat_interleave(2, 0).repeat_interleave(2, 1))
    nothing = torch.full((40, 80), 255, dtype=torch.uint8)
    assert (augment(0, (make_sample()[0], nothing), crop_size=20)[1] == 255).all()


def test_crops_of_one_class_are_drawn_again():
    """Of 181 places 9 hold between a quarter and three quarters of each class: 5 % of single crops, 43 % of eleven."""
    labels = torch.zeros(20, 200, dtype=torch.uint8)
    labels[:, 100:] = 1
    image = torch.zeros(3, 20, 200, dtype=torch.uint8)

    def count_mixed() -> float:
        crops = [augment(seed, (image, labels), min_sizes=(20,), crop_size=20)[1] for seed in range(300)]
        return sum(.25 < (crop > 0).float().mean() < .75 for crop in crops) / 300
    assert abs(count_mixed() - (1 - (172 / 181) ** 11)) < .1
    labels[:, 100:] = 255  # ignored pixels are no second class
    assert abs(count_mixed() - 9 / 181) < .05


def test_photometric_distortion_keeps_the_order_of_channels():
    image = torch.tensor([200, 60, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8).contiguous()
    colours = {tuple(augment(seed, (image, torch.zeros(8, 8, dtype=torch.uint8)), min_sizes=(8,), photometric=True)
                     [0][:, 0, 0].tolist()) for seed in range(40)}
    assert len(colours) > 30 and all(max(colour) == colour[0] for colour in colours)


@pytest.mark.parametrize('settings, message', [
    (dict(min_sizes=()), r'min_sizes of the augmentation is \(\): it must be one or more above 0'),
    (dict(max_size=30), 'max_size of the augmentation is 30: it must be not below'),
    (dict(scale=(2., 1.)), 'scale of the augmentation is'), (dict(scale=(0., 1.)), 'two factors above 0'),
    (dict(crop_size=-1), 'crop_size of the augmentation is -1'), (dict(hflip=1.5), 'hflip .* is 1.5'),
    (dict(vflip=-1), 'vflip .* is -1')])
def test_impossible_augmentation_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        augment(**settings)


# Samples --------------------------------------------------------------------------------------------------------------

def make_samples(task: str, split: str = 'train'):
    transform = build_transform(DenseAugment((96, 128), 200, (.8, 1.2), crop_size=96, vflip=.5, photometric=True))
    if task == 'objects':
        return DetectionSamples(read_coco(DATA / 'nuclei', split), transform, masks=True)
    return SegmentationSamples(read_masks(DATA / 'nuclei', split), transform)


def flatten(item) -> list:
    target = item[1] if isinstance(item[1], dict) else dict(labels=item[1])
    return [item[0], *target.values()]


def are_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flatten(first), flatten(second), strict=True))


@pytest.mark.parametrize('task', TASKS)
def test_a_sample_depends_on_its_seed_alone(task):
    samples = make_samples(task, 'val')
    first = samples[Sample(3, 5)]
    torch.rand(7)
    assert are_equal(first, samples[Sample(3, 5)])
    assert first[2] == [] and not torch.equal(first[0], samples[Sample(3, 6)][0])
    batches = [[Sample(i, 100 + i), Sample(i + 1, 200 + i)] for i in range(4)]
    one, two = ([(x, y, []) for batch in DataLoader(
        samples, batch_sampler=batches, num_workers=workers, collate_fn=collate)
        for x, y in zip(batch.images, batch.targets, strict=True)] for workers in (0, 2))
    assert len(one) == len(two) == 8 and all(map(are_equal, one, two))
    if task == 'objects':
        check_targets([item[1] for item in one], 1)


def write_shapes(root: Path, entries: list, split: str = 'train', names: tuple = ('a', 'b', 'c')) -> Path:
    """Images of 40 x 80 pixels as `make_sample` has them."""
    (root / split).mkdir(parents=True)
    for name in names:
        Image.fromarray(make_sample()[0].permute(1, 2, 0).numpy()).save(root / split / f'{name}.png')
    images = [dict(id=i, file_name=f'{name}.png', height=40, width=80) for i, name in enumerate(names)]
    categories = [dict(id=90, name='pear'), dict(id=3, name='apple'), dict(id=7, name='fig')]
    (root / f'{split}.json').write_text(json.dumps(
        dict(images=images, categories=categories, annotations=entries)), encoding='utf-8')
    return root


def describe_box(image: int, category: int = 90, **changes) -> dict:
    left, top, right, bottom = BOX
    return dict(dict(id=10 + image, image_id=image, category_id=category, bbox=[
        left, top, right - left, bottom - top]), **changes)


def encode_box() -> np.ndarray:
    return np.asfortranarray(make_sample()[1]['masks'][0].numpy())


def count_runs(pixels: np.ndarray) -> list:
    """Lengths of the runs of 0 and 1 in turn, by columns, as COCO's uncompressed RLE has them."""
    flat, runs, value = pixels.flatten(order='F'), [0], 0
    for pixel in flat.tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_targets_have_all_kinds_of_masks_and_labels_from_zero(tmp_path):
    left, top, right, bottom = BOX
    compressed = rle.encode(encode_box())
    shapes = [[[left, top, right, top, right, bottom, left, bottom]],
              dict(size=[40, 80], counts=count_runs(encode_box())),
              dict(size=[40, 80], counts=compressed['counts'].decode())]
    data = read_coco(write_shapes(tmp_path, [
        describe_box(i, category, segmentation=shape)
        for i, (category, shape) in enumerate(zip((90, 3, 7), shapes, strict=True))]), 'train')
    samples = DetectionSamples(data, build_transform(replace(PLAIN, min_sizes=(40,))), masks=True)
    image, expected = make_sample()
    for i, label in enumerate([2, 0, 1]):  # apple 3, fig 7, pear 90
        pixels, target, _ = samples[Sample(i)]
        assert torch.equal(pixels, image) and target['labels'].tolist() == [label]
        assert torch.equal(target['boxes'], expected['boxes']) and torch.equal(target['masks'], expected['masks'])
    plain = DetectionSamples(data, build_transform(PLAIN), masks=False)
    assert set(plain[Sample(0)][1]) == {'boxes', 'labels'} and samples.notes == []


def test_images_without_objects_are_negatives(tmp_path):
    samples = DetectionSamples(
        read_coco(write_shapes(tmp_path, [describe_box(0, segmentation=[[1, 1, 9, 1, 9, 9]])]), 'train'),
        build_transform(DenseAugment((20, 60), 200, (.5, 2.), 24, .5, .5, True, True)), masks=True)
    assert len(samples) == 3 and any('2 images without objects are trained on as neg' in note for note in samples.notes)
    for seed in range(10):
        image, target, _ = samples[Sample(1, seed)]
        assert target['boxes'].shape == (0, 4) and target['boxes'].dtype == torch.float32
        assert target['labels'].shape == (0,) and target['labels'].dtype == torch.int64
        assert target['masks'].shape == (0, *image.shape[1:]) and target['masks'].dtype == torch.uint8


def test_crowds_are_left_out_and_never_make_an_image_empty(tmp_path):
    crowd = dict(size=[40, 80], counts=count_runs(encode_box()))
    data = read_coco(write_shapes(tmp_path, [
        describe_box(0, segmentation=[[10, 4, 30, 4, 30, 24]]), describe_box(0, 3, iscrowd=1, segmentation=crowd),
        describe_box(1, iscrowd=1, segmentation=crowd)]), 'train')
    samples = DetectionSamples(data, build_transform(PLAIN), masks=True)
    assert [image.path.name for image in samples.data.images] == ['a.png', 'c.png']
    assert samples[Sample(0)][1]['labels'].tolist() == [2] and samples[Sample(1)][1]['labels'].tolist() == []
    notes = ' '.join(samples.notes)
    assert '2 crowds are not trained on' in notes and '1 images have nothing but crowds' in notes and 'b.png' in notes
    assert 'classes without objects, which are not learnt: apple, fig' in notes
    assert 'all objects have one class, pear' in notes
    assert [len(image.objects) for image in data.images] == [2, 1, 0]  # for the scorer
    with pytest.raises(DataError, match='has no objects to train on'):
        select_training(replace(data, images=data.images[1:]))


def test_unreadable_images_are_replaced_and_named(tmp_path):
    root = write_shapes(tmp_path, [describe_box(0), describe_box(2, 3)])
    (root / 'train' / 'b.png').write_bytes((root / 'train' / 'b.png').read_bytes()[:100])
    samples = DetectionSamples(read_coco(root, 'train'), build_transform(DenseAugment((40, 50), 200)), masks=False)
    item = samples[Sample(1, 9)]
    assert are_equal(item, samples[Sample(2, 9)]) and item[1]['labels'].tolist() == [0]
    (name, reason), = item[2]
    assert name == str(root / 'train' / 'b.png') and 'OSError' in reason
    with pytest.raises(DataError, match=r'b\.png cannot be read as an image'):
        samples.data.images[1].load()
    for name in 'ac':
        (root / 'train' / f'{name}.png').write_bytes(b'')
    with pytest.raises(DataError, match='50 images in a row cannot be read'):
        samples[Sample(0)]
    batch = collate([item, (None, -1, [('x', 'y')])])
    assert len(batch.images) == len(batch.targets) == 1 and batch.unreadable[-1] == ('x', 'y')


def test_polygons_of_two_points_are_dropped_with_a_note(tmp_path):
    data = read_coco(write_shapes(tmp_path, [
        describe_box(0, segmentation=[[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]]),
        describe_box(1, segmentation=[[1, 1]])]), 'train')
    assert 'polygons of fewer than 3 points were dropped: annotations 10, 11' in data.notes[0]
    with pytest.raises(DataError, match='1 objects have no segmentation, which masks need: annotations 11'):
        encode_masks(data)


@pytest.mark.parametrize('shape, message', [
    ([[1, 1, 9, 1, 9, 9, 1]], 'a polygon lacks a coordinate'),
    ([[1, 1, 9, float('nan'), 9, 9]], 'a coordinate is no number, or too large'),
    ([[1, 1, 9, 1e30, 9, 9]], 'a coordinate is no number, or too large'),
    ([1, 1, 9, 1, 9, 9], 'no mask of its image'), ([['x'] * 6], 'no mask of its image'),
    ('abc', 'no mask of its image'),
    (dict(size=[40, 80], counts=[1, 2]), 'decoded 3 pixels but expected 3200'),
    (dict(size=[40, 80], counts='zzzz~~'), 'RLE'),
    (dict(size=[40, 80]), 'counts'), (dict(size=[80, 40], counts=[3200]), r'the image is 40 x 80')])
def test_broken_segmentations_are_refused_in_one_line(tmp_path, shape, message):
    data = read_coco(write_shapes(tmp_path, [describe_box(0, segmentation=shape)]), 'train')
    with pytest.raises(DataError, match='annotation 10 has a segmentation that is no mask of its image') as caught:
        encode_masks(data)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_images_that_fit_both_ways_are_rotated_upright(tmp_path):
    """As predict and classifiers do: here by 180 degrees."""
    pixels = np.zeros((8, 10, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / 'x.png', exif=exif)
    image = CocoImage(1, tmp_path / 'x.png', 8, 10, []).read()
    assert (image[:, -1] == 255).all() and not image[:, :-1].any()


def test_masks_of_more_classes_than_values_are_refused(tmp_path):
    for name in ('train', 'train_masks'):
        (tmp_path / name).mkdir()
        Image.new('L', (8, 8)).save(tmp_path / name / 'a.png')
    with pytest.raises(DataError, match='has 300 classes: masks have at most 255'):
        read_masks(tmp_path, 'train', 300)


def test_inspect_says_what_will_be_done(tmp_path, capsys):
    root = write_shapes(tmp_path, [
        describe_box(0, bbox=[1, 1, .5, 9], segmentation=[[1, 1, 9, 1, 9, 9]]), describe_box(1, iscrowd=1)],
        names=('a', 'b', 'c', 'd', 'e'))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 80)).save(root / 'train' / 'c.png', exif=exif)
    (root / 'train' / 'd.png').write_bytes(b'')
    Image.new('RGB', (9, 9)).save(root / 'train' / 'e.png')
    assert caretrans_main(['inspect', str(root), '--split', 'train']) == 0
    out = capsys.readouterr().out
    for text in ('1 crowds are not trained on', 'nothing but crowds and are not trained on: b.png',
                 '1 objects are narrower or lower than a pixel', 'without objects, which are not learnt: apple, fig',
                 'refused by Mask R-CNN: ', 'fit them as they are seen, so they are read like that: c.png',
                 'training takes the next image instead, evaluation stops: d.png',
                 'another size than their annotations; they are refused: e.png'):
        assert text in out, text


# Label maps -----------------------------------------------------------------------------------------------------------

def write_mask(root: Path, values: np.ndarray, image_format: str = 'PNG', classes: str = 'a\nb\n') -> Path:
    for folder in ('train', 'train_masks'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new('RGB', values.shape[1::-1]).save(root / 'train' / 'x.png')
    Image.fromarray(values).save(root / 'train_masks' / 'x.png', format=image_format)
    (root / 'classes.txt').write_text(classes, encoding='utf-8')
    return root


def halves(first, second, dtype=np.uint8) -> np.ndarray:
    values = np.full((8, 12), first, dtype)
    values[:, 6:] = second
    return values


@pytest.mark.parametrize('values, image_format, message', [
    (halves(0, -1, np.int32), 'TIFF', 'x.png has the values -1, classes are 0 to 1 and 255 is ignored'),
    (halves(0, .5, np.float32), 'TIFF', 'x.png is 8 x 12 of float32: a mask has one number per pixel, a whole one'),
    (halves(0, 300, np.uint16), 'PNG', 'x.png has the values 300'),
    (halves(0, 2), 'PNG', 'x.png has the values 2'),
    (halves(255, 255), 'PNG', 'no pixel has a class, all are 255, which is ignored'),
    (np.zeros((8, 12, 3), np.uint8), 'PNG', 'x.png is 8 x 12 x 3 of uint8')])
def test_masks_of_other_values_are_refused_before_training(tmp_path, values, image_format, message):
    data = read_masks(write_mask(tmp_path, values, image_format), 'train')
    with pytest.raises(DataError) as caught:
        SegmentationSamples(data, build_transform(PLAIN))
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_masks_of_other_depths_are_read(tmp_path):
    for values in (halves(0, 1, np.uint16), halves(False, True, bool), halves(0, 1)):
        data = read_masks(write_mask(tmp_path, values), 'train')
        assert torch.equal(data.load(0)[1], torch.from_numpy(halves(0, 1))) and check_masks(data) == []


def test_one_class_everywhere_is_noted(tmp_path):
    samples = SegmentationSamples(read_masks(write_mask(tmp_path, halves(0, 255)), 'train'), build_transform(PLAIN))
    note, = samples.notes
    assert 'every pixel with a class has the class 0, 50.0 % are 255, which is ignored' in note


def test_classes_of_masks_come_from_a_file(tmp_path):
    root = write_mask(tmp_path, halves(0, 1))
    assert read_masks(root, 'train').num_classes == 2
    (root / 'classes.txt').unlink()
    with pytest.raises(DataError, match=r'are not known: list their names in .*classes\.txt'):
        read_masks(root, 'train')
    ade = write_masks(tmp_path / 'ade', 'images/training', 'annotations/training')
    (ade / 'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tName\n' + ''.join(
        f'{i}\t.1\t9\t9\tthing {i}, item\n' for i in range(1, 151)), encoding='utf-8')
    data = read_masks(ade, 'train')
    assert data.num_classes == 150 and data.classes[0] == 'thing 1' and data.reduce_zero_label
    samples = SegmentationSamples(data, build_transform(replace(PLAIN, min_sizes=(40,))))
    raw = torch.from_numpy(np.array(Image.open(data.masks[0])))
    labels = samples[Sample(0)][1]
    assert torch.equal(labels == 0, raw == 1) and torch.equal(labels == 255, (raw == 0) | (raw == 255))
    assert read_masks(ade, 'train', 150).classes == []  # a published segmenter has its own names


def test_masks_of_nested_folders_belong_to_their_images(tmp_path):
    for town, value in (('bonn', 0), ('ulm', 1)):
        for folder in ('train', 'train_masks'):
            (tmp_path / folder / town).mkdir(parents=True)
        Image.new('RGB', (12, 8)).save(tmp_path / 'train' / town / 'x.jpg')
        Image.fromarray(halves(value, value)).save(tmp_path / 'train_masks' / town / 'x.png')
    (tmp_path / 'train' / 'notes.md').write_text('', encoding='utf-8')
    data = read_masks(tmp_path, 'train', 2)
    assert [int(data.load(i)[1].max()) for i in range(2)] == [0, 1] and 'notes.md' in data.notes[0]


def test_unreadable_masks_are_replaced_and_named(tmp_path):
    root = write_masks(tmp_path)
    (root / 'val_masks' / '0.png').write_bytes(b'no image')
    samples = SegmentationSamples(read_masks(root, 'val', 2), build_transform(DenseAugment((30, 48), 100)))
    assert '1 masks cannot be read: 0.png' in samples.notes[0]
    item = samples[Sample(0, 4)]
    assert item[2][0][0].endswith('0.jpg') and are_equal(item, samples[Sample(1, 4)])


def test_inspect_judges_every_value(tmp_path, capsys):
    def inspect(values, *options) -> str:
        assert caretrans_main(['inspect', str(write_mask(tmp_path, values, *options)), '--split', 'train']) == 0
        return capsys.readouterr().out
    out = inspect(halves(0, 3))
    assert '0 (a): 50.00 %' in out and '3 (no class, refused)' in out and 'refused: ' in out
    assert 'every pixel with a class has the class 1' in inspect(halves(1, 255))
    assert '1 masks are refused, the first: ' in inspect(halves(0, -1, np.int32), 'TIFF')
    (tmp_path / 'train_masks' / 'x.png').write_bytes(b'')
    assert caretrans_main(['inspect', str(tmp_path), '--split', 'train']) == 0
    assert '1 images or their masks cannot be read' in capsys.readouterr().out


# Bundled data ---------------------------------------------------------------------------------------------------------

def test_the_bundled_data_are_as_documented():
    text = (DATA / 'README.md').read_text(encoding='utf-8')
    for name, split, images, objects in (
            ('cards', 'train', 296, 527), ('cards', 'val', 67, 143), ('nuclei', 'train', 180, 4363),
            ('nuclei', 'val', 60, 1394)):
        data = read_coco(DATA / name, split)
        assert len(data.images) == images and sum(len(image.objects) for image in data.images) == objects
        assert data.notes == select_training(data).notes == [] and f'{images} images, {objects:,} ' in text.replace(
            '\n', ' ')
    files = [file for name in ('cards', 'nuclei') for file in (DATA / name).rglob('*') if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files if file.name != 'LICENSE'} == {'.jpg', '.json', '.png', '.txt'}


def test_the_label_maps_of_nuclei_are_the_union_of_their_objects():
    data, masks = encode_masks(read_coco(DATA / 'nuclei', 'val')), read_masks(DATA / 'nuclei', 'val')
    assert masks.classes == ['background', 'nucleus']
    for image in data.images[:10]:
        union = rle.decode(rle.merge([entry['segmentation'] for entry in image.objects]))
        assert torch.equal(masks.load(masks.images.index(image.path))[1], torch.from_numpy(union))


def test_val_may_be_called_valid(tmp_path):
    root = write_shapes(tmp_path, [describe_box(0)], 'valid')
    (root / 'valid.json').rename(root / 'valid' / '_annotations.coco.json')
    assert len(read_coco(root, 'val').images) == 3


def test_annotations_keep_their_ids(tmp_path):
    data = read_coco(write_coco(tmp_path, annotations=[annotation(id=77)]), 'val')
    assert data.images[0].objects[0]['id'] == 77 and data.to_coco()['annotations'][0]['id'] == 1
