"""Average precision and mean IoU: known answers, odd annotations, one process and two."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_folders import annotation, write_coco, write_masks
from photos import FRUIT
from PIL import Image
from validate import main

import caretrans
from caretrans.__main__ import main as caretrans_main
from caretrans.dense import create_dense_model, save_checkpoint
from caretrans.dense.coco import read_coco
from caretrans.dense.evaluate import average_precision, score_pixels
from caretrans.dense.masks import read_masks
from caretrans.errors import DataError

ROOT = Path(caretrans.__file__).parent.parent


def results_of(data, score=.9) -> list:
    """Detections equal to the annotations."""
    return [dict(image_id=image.id, category_id=entry['category_id'], bbox=entry['bbox'], score=score)
            for image in data.images for entry in image.objects]


def test_what_the_data_do_not_have_has_no_score_without_detections_either(tmp_path):
    data = read_coco(write_coco(tmp_path), 'val')
    scores, classes = average_precision(data, [], 'bbox')
    assert scores['AP'] == scores['AP50'] == 0 and scores['AP_large'] is None and classes == dict(apple=0., pear=0.)
    empty = replace(data, images=[replace(image, objects=[]) for image in data.images])
    scores, classes = average_precision(empty, [], 'bbox')
    assert set(scores.values()) == set(classes.values()) == {None}


def test_perfect_detections_have_full_precision_and_shifted_ones_less(tmp_path):
    data = read_coco(write_coco(tmp_path), 'val')
    assert data.classes == ['apple', 'pear'] and [len(image.objects) for image in data.images] == [2, 1, 1, 0]
    scores, classes = average_precision(data, results_of(data), 'bbox')
    assert scores['AP'] == scores['AP50'] == 100 and classes == dict(apple=100., pear=100.)
    shifted = [dict(entry, bbox=[entry['bbox'][0] + entry['bbox'][2] / 4, *entry['bbox'][1:]])  # IoU 0.6
               for entry in results_of(data)]
    scores, _ = average_precision(data, shifted, 'bbox')
    assert scores['AP50'] == 100 and scores['AP75'] == 0 and abs(scores['AP'] - 30) < 1e-6
    swapped = [dict(entry, category_id=93 - entry['category_id']) for entry in results_of(data)]
    assert average_precision(data, swapped, 'bbox')[0]['AP'] == 0
    assert average_precision(data, [], 'bbox')[0]['AP'] == 0


def test_average_precision_is_that_of_torchmetrics(tmp_path):
    from torchmetrics.detection import MeanAveragePrecision
    data = read_coco(write_coco(tmp_path), 'val')
    rng, results = np.random.RandomState(0), []
    for image in data.images:
        for _ in range(20):
            x, y = rng.randint(0, 40, 2)
            w, h = rng.randint(10, 40, 2)
            results.append(dict(image_id=image.id, category_id=int(rng.choice([3, 90])),
                                bbox=[int(x), int(y), int(w), int(h)], score=float(rng.rand())))
    results += results_of(data, .5)
    metric = MeanAveragePrecision(backend='faster_coco_eval', box_format='xywh')
    for image in data.images:
        found = [entry for entry in results if entry['image_id'] == image.id]
        metric.update(
            [dict(boxes=torch.tensor([entry['bbox'] for entry in found]).float(),
                  scores=torch.tensor([entry['score'] for entry in found]),
                  labels=torch.tensor([entry['category_id'] for entry in found]))],
            [dict(boxes=torch.tensor([entry['bbox'] for entry in image.objects]).float().reshape(-1, 4),
                  labels=torch.tensor([entry['category_id'] for entry in image.objects]).long())])
    expected = metric.compute()
    scores, _ = average_precision(data, results, 'bbox')
    assert 0 < scores['AP'] < 100
    assert abs(scores['AP'] / 100 - expected['map']) < 1e-6 and abs(scores['AP50'] / 100 - expected['map_50']) < 1e-6


@pytest.mark.parametrize('entry, objects, note', [
    (annotation(bbox=[5, 5, 0, 10]), 0, 'boxes without width or height'),
    (annotation(bbox=[90, 5, 10, 10]), 0, 'boxes without width or height'),
    (annotation(bbox=[float('nan'), 5, 10, 10]), 0, 'boxes without width or height'),
    (annotation(bbox=[-5, 5, 20, 10]), 1, 'clipped to their image'),
    (annotation(image_id=99), 0, 'unknown images'),
    (annotation(iscrowd=1), 1, None),
    (annotation(), 1, None)])
def test_odd_annotations_are_named_and_handled(tmp_path, entry, objects, note):
    data = read_coco(write_coco(tmp_path, annotations=[entry]), 'val')
    assert sum(len(image.objects) for image in data.images) == objects
    assert (note is None) == (data.notes == []) and (note or '') in ' '.join(data.notes)
    if objects:
        kept = data.images[0].objects[0]
        assert kept['iscrowd'] == entry.get('iscrowd', 0) and kept['area'] == kept['bbox'][2] * kept['bbox'][3]


@pytest.mark.parametrize('changes, message', [
    (dict(annotations=[annotation(category_id=4)]), 'annotation 7 has the category 4'),
    (dict(annotations=[annotation(bbox=[1, 2, 3])]), 'annotation 7 has no bbox'),
    (dict(annotations=[annotation(bbox='1 2 3 4')]), 'annotation 7 has no bbox'),
    (dict(annotations=[annotation(bbox='1234')]), 'annotation 7 has no bbox'),
    (dict(annotations=[annotation(category_id=[1])]), r'category_id of annotation 7 is \[1\]: it must be a whole'),
    (dict(annotations=[annotation(image_id='x')]), "image_id of annotation 7 is 'x': it must be a whole number"),
    (dict(annotations=[annotation(iscrowd='no')]), "iscrowd of annotation 7 is 'no': it must be a whole number"),
    (dict(annotations=[annotation(area='big')]), "area of annotation 7 is 'big': it must be a number, or missing"),
    (dict(annotations=None), "no list 'annotations'"),
    (dict(categories=[dict(id=1, name='a'), dict(id='y', name='b')]), "id of a category is 'y': it must be a whole"),
    (dict(images=[dict(id='im0', file_name='0.png', height=64, width=80)]), "id of image 0 is 'im0': it must be"),
    (dict(images=[dict(id=1, file_name='0.png', height=-5, width=80)]), 'height of image 0 is -5: .* at least 1'),
    (dict(images=[dict(id=1, file_name='0.png', height='tall', width=80)]), "height of image 0 is 'tall'"),
    (dict(images=[dict(id=1, file_name=7, height=64, width=80)]), 'file_name of image 0 is 7: it must be a text'),
    (dict(categories=[]), 'categories are missing'),
    (dict(categories=[dict(id=1, name='a'), dict(id=1, name='b')]), 'ids or names are repeated'),
    (dict(categories=[dict(name='a')]), "a category lacks 'id'"),
    (dict(images=[]), 'has no images'),
    (dict(images=[dict(id=1, file_name='0.png')]), "image 0 lacks 'height'"),
    (dict(images=[dict(id=1, file_name='x.png', height=64, width=80)]), 'lacks 1 images'),
    (dict(images=2 * [dict(id=1, file_name='0.png', height=64, width=80)]), 'two images have the id 1')])
def test_broken_annotations_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        read_coco(write_coco(tmp_path, **changes), 'val')
    assert '\n' not in str(caught.value)


def test_other_broken_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match='no annotations of val'):
        read_coco(tmp_path, 'val')
    root = write_coco(tmp_path / 'data')
    Image.new('RGB', (10, 10)).save(root / 'val' / '0.png')
    with pytest.raises(DataError, match='10 x 10 pixels, its annotations are for 64 x 80'):
        read_coco(root, 'val').images[0].load()
    (root / 'val.json').write_text('{', encoding='utf-8')
    with pytest.raises(DataError, match='is not JSON'):
        read_coco(root, 'val')


def test_images_are_as_large_as_annotated(tmp_path):
    """Stored, or rotated upright."""
    root = write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / 'val' / '0.png').convert('RGB').rotate(90, expand=True).save(root / 'val' / '0.png', exif=exif)
    image = read_coco(root, 'val').images[0]
    assert image.load().shape == (3, 64, 80)


def test_a_folder_is_described(tmp_path, capsys):
    coco = write_coco(tmp_path / 'coco', annotations=[annotation(), annotation(id=8, bbox=[5, 5, 0, 10])])
    assert caretrans_main(['inspect', str(coco), '--split', 'val']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '4 images (3 without objects), 1 objects, 2 classes' in lines[0] and '  apple: 1 objects' in lines
    assert any('without width or height in the image were dropped: annotations 8' in line for line in lines)
    caretrans_main(['inspect', str(write_masks(tmp_path / 'masks')), '--split', 'val'])
    lines = capsys.readouterr().out.splitlines()
    assert '3 images with masks, 3 values' in lines[0] and lines[-1].startswith('  255 (ignored): ')
    caretrans_main(['inspect', str(FRUIT)])
    out = capsys.readouterr().out
    assert '732 images, 14 classes' in out and '661 images, 14 classes' in out and '  kaiser: ' in out
    assert caretrans_main(['inspect', str(tmp_path)]) == 2
    assert 'has no train: neither annotations' in capsys.readouterr().err


# Masks ----------------------------------------------------------------------------------------------------------------

def test_palette_masks_are_indices_and_zero_is_reduced_once(tmp_path):
    data = read_masks(write_masks(tmp_path), 'val', 2)
    pixels, labels = data.load(0)
    assert pixels.shape == (3, 48, 40) and labels.unique().tolist() == [0, 1, 255]
    reduced = read_masks(tmp_path, 'val', 1, reduce_zero_label=True).load(0)[1]
    assert reduced.unique().tolist() == [0, 255] and torch.equal(reduced == 0, labels == 1)
    ade = read_masks(write_masks(tmp_path / 'ade', 'images/validation', 'annotations/validation'), 'val', 150)
    assert ade.reduce_zero_label and 'no class' in ade.notes[0] and torch.equal(ade.load(0)[1], reduced)


def test_broken_masks_are_refused(tmp_path):
    root = write_masks(tmp_path)
    with pytest.raises(DataError, match=r'has the values 1, classes are 0 to 0 and 255 is ignored'):
        read_masks(root, 'val', 1).load(0)
    Image.new('RGB', (40, 48)).save(root / 'val_masks' / '1.png')
    with pytest.raises(DataError, match='a mask has one number per pixel'):
        read_masks(root, 'val', 2).load(1)
    (root / 'val_masks' / '2.png').unlink()
    with pytest.raises(DataError, match='lacks the masks of 1 images'):
        read_masks(root, 'val', 2)
    with pytest.raises(DataError, match='no images and masks of train'):
        read_masks(root, 'train', 2)


def test_mean_iou_leaves_out_classes_that_do_not_occur():
    scores, classes = score_pixels(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), 'abc')
    assert classes == dict(a=pytest.approx(50.), b=pytest.approx(400 / 7), c=None)
    assert scores == dict(mIoU=pytest.approx((50 + 400 / 7) / 2), accuracy=pytest.approx(70.))
    with pytest.raises(DataError, match='all are ignored'):
        score_pixels(torch.zeros(2, 2, dtype=torch.int64), 'ab')


# validate.py ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp('dense_models'), {}
    torch.manual_seed(0)
    small = dict(channels=16, model_args=dict(depths=[1, 1, 1, 1]))
    for task, options in (
            ('mask_rcnn', dict(min_size=96, max_size=128, hidden=32, mask_convs=1, proposals=20, score_thresh=0.)),
            ('semantic_fpn', dict(head_channels=16, min_size=64))):
        paths[task] = folder / f'{task}.pth'
        save_checkpoint(paths[task], create_dense_model(task, 'casvit_xs', 2, **small, **options), ['apple', 'pear'])
    return paths


def evaluate(monkeypatch, capsys, *flags) -> tuple:
    monkeypatch.setattr('sys.argv', ['validate.py', *map(str, flags), '--device', 'cpu'])
    code = main()
    return code, *capsys.readouterr()


def test_the_script_scores_detectors_and_segmenters(files, tmp_path, monkeypatch, capsys):
    coco, masks = write_coco(tmp_path / 'coco'), write_masks(tmp_path / 'masks')
    code, out, _ = evaluate(monkeypatch, capsys, files['mask_rcnn'], coco)
    assert code == 0 and 'boxes: AP ' in out and 'masks: AP ' in out and '  apple' in out
    code, out, _ = evaluate(monkeypatch, capsys, files['semantic_fpn'], masks, '--json')
    scores = json.loads(out)
    assert code == 0 and scores['images'] == 3 and 0 <= scores['pixel']['mIoU'] <= 100
    code, _, err = evaluate(monkeypatch, capsys, files['semantic_fpn'], masks, '--batch-size', 2, '--real-labels', 'x')
    assert code == 2 and '--batch-size, --real-labels cannot be used with a detector or segmenter' in err
    code, _, err = evaluate(monkeypatch, capsys, files['semantic_fpn'])
    assert code == 2 and 'Name a folder of data' in err
    content = json.loads((coco / 'val.json').read_text(encoding='utf-8'))
    content['categories'][0]['name'] = 'plum'
    (coco / 'val.json').write_text(json.dumps(content), encoding='utf-8')
    code, _, err = evaluate(monkeypatch, capsys, files['mask_rcnn'], coco)
    assert code == 2 and 'missing pear; unknown plum' in err


@pytest.mark.slow
def test_two_processes_score_like_one(files, tmp_path):
    def run(data, *launcher) -> dict:
        command = [sys.executable, *launcher, 'validate.py', files['mask_rcnn'], data, '--json', '--device', 'cpu']
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, encoding='utf-8', timeout=300,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    data = write_coco(tmp_path)
    one, two = run(data), run(data, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)
    assert {key: value for key, value in one.items() if key != 'seconds'} == {
        key: value for key, value in two.items() if key != 'seconds'}
