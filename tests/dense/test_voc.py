"""Data in the format of Pascal VOC: the reader, and VOC's average precision by hand."""
import json

import pytest
import torch
from dense_folders import write_coco, write_voc, write_xml
from PIL import Image
from validate import main

from caretrans.__main__ import main as caretrans_main
from caretrans.dense import create_dense_model, save_checkpoint
from caretrans.dense.coco import encode_masks
from caretrans.dense.objects import has_objects, read_objects, select_training
from caretrans.dense.voc import VOC_CLASSES, has_voc, read_voc
from caretrans.dense.voc_metric import voc_average_precision
from caretrans.errors import DataError

DOG, CAT = ('dog', 11, 6, 41, 31, 0), ('cat', 1, 1, 80, 64, 0)


def test_boxes_count_from_zero_and_difficult_objects_are_marked(tmp_path):
    data = read_voc(write_voc(tmp_path, dict(a=[DOG, ('cat', '21.9', 1, 31, 11, 1)], b=[])), 'train')
    assert data.layout == 'VOC' and data.classes == list(VOC_CLASSES) == sorted(VOC_CLASSES)
    first, second = data.images
    assert first.path == tmp_path / 'JPEGImages' / 'a.jpg' and (first.width, first.height) == (80, 64)
    assert [entry['bbox'] for entry in first.objects] == [[10, 5, 30, 25], [20, 0, 10, 10]]
    assert [data.categories[entry['category_id']] for entry in first.objects] == ['dog', 'cat']
    assert [entry['iscrowd'] for entry in first.objects] == [0, 1] and second.objects == []
    assert first.load().shape == (3, 64, 80)


def test_two_years_are_merged_but_for_the_test_split(tmp_path):
    for year in (2007, 2012):
        for split in ('trainval', 'test'):
            write_voc(tmp_path / f'VOC{year}', {f'{year}_{split}': [DOG]}, split)
    for root in (tmp_path, tmp_path / 'VOC2007'):
        assert has_voc(root, 'trainval') and not has_voc(root, 'val')
        years = [2007, 2012] if root == tmp_path else [2007]
        assert [image.path.stem for image in read_voc(root, 'trainval').images] == [f'{y}_trainval' for y in years]
        assert [image.path.stem for image in read_voc(root, 'test').images] == ['2007_test']
    assert [image.id for image in read_voc(tmp_path, 'trainval').images] == [1, 2]
    (tmp_path / 'devkit').mkdir()
    (tmp_path / 'VOC2007').rename(tmp_path / 'devkit' / 'VOC2007')
    (tmp_path / 'devkit').rename(tmp_path / 'VOCdevkit')
    (tmp_path / 'VOC2012').rename(tmp_path / 'unused')
    assert len(read_voc(tmp_path, 'trainval').images) == 1


def test_a_plain_folder_has_its_own_classes_in_one_order_for_all_splits(tmp_path):
    for split, objects in (('train', [('pear', 1, 1, 9, 9, 0)]), ('val', [('fig', 1, 1, 9, 9, 0)])):
        write_xml(tmp_path / split / 'x.y.xml', *objects, head='<?xml version="1.0" encoding="utf-8"?>')
        Image.new('RGB', (80, 64)).save(tmp_path / split / 'x.y.jpg')
    Image.new('RGB', (80, 64)).save(tmp_path / 'train' / 'z.jpg')
    train, val = (read_objects(tmp_path, split) for split in ('train', 'val'))
    assert train.classes == val.classes == ['fig', 'pear'] and len(train.images) == 1
    (tmp_path / 'train' / '._x.y.xml').write_bytes(b'\x00\x05')  # of a Mac
    assert read_objects(tmp_path, 'train').classes == train.classes
    assert '1 images have no XML file and are skipped: z.jpg' in train.notes[0]
    (tmp_path / 'classes.txt').write_text('pear\nplum\nfig\n', encoding='utf-8')
    assert read_objects(tmp_path, 'train').classes == ['pear', 'plum', 'fig']


def test_a_missing_size_is_that_of_the_upright_image(tmp_path):
    write_xml(tmp_path / 'train' / 'a.xml', ('pear', 1, 1, 61, 71, 0), size=None)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (80, 64)).save(tmp_path / 'train' / 'a.jpg', exif=exif)
    image, = read_voc(tmp_path, 'train').images
    assert (image.width, image.height) == (64, 80) and image.load().shape == (3, 80, 64)
    assert image.objects[0]['bbox'] == [0, 0, 60, 70]


def test_coco_comes_before_voc(tmp_path):
    assert not has_objects(tmp_path, 'val')
    with pytest.raises(DataError, match='no annotations of val: expected val.json and val/ or another layout of COCO'):
        read_objects(tmp_path, 'val')
    write_voc(tmp_path, dict(a=[DOG]), 'val')
    assert read_objects(tmp_path, 'val').layout == 'VOC'
    write_coco(tmp_path)
    assert read_objects(tmp_path, 'val').layout == 'COCO'


def break_xml(text: str):
    def change(root) -> None:
        (root / 'Annotations' / 'a.xml').write_text(text, encoding='utf-8')
    return change


def break_object(**changes):
    def change(root) -> None:
        file = root / 'Annotations' / 'a.xml'
        text = file.read_text(encoding='utf-8')
        for old, new in changes.values():
            text = text.replace(old, new)
        file.write_text(text, encoding='utf-8')
    return change


@pytest.mark.parametrize('change, message', [
    (break_xml('<annotation><object>'), r'a\.xml is not XML \(ParseError: '),
    (break_xml(''), r'a\.xml is not XML'),
    (break_xml('<?xml version="1.0" encoding="x-none"?><annotation/>'), r'a\.xml is not XML'),
    (break_xml('<html/>'), r'a\.xml is an XML file of <html>, not of <annotation>'),
    (break_object(name=('<name>dog</name>', '')), r'a\.xml: object 1 has no <name>'),
    (break_object(box=('<xmin>11</xmin>', '')), r'a\.xml: object 1 has no <bndbox> with four numbers'),
    (break_object(box=('<xmin>11', '<xmin>left')), r'a\.xml: object 1 has no <bndbox> with four numbers'),
    (break_object(box=('<xmin>11', '<xmin>inf')), r'a\.xml: object 1 has no <bndbox> with four numbers'),
    (break_object(size=('<width>80', '<width>wide')), r'a\.xml has a <size> that is no number'),
    (lambda root: (root / 'Annotations' / 'a.xml').unlink(), r'lacks the annotations of 1 of its images: a\.xml'),
    (lambda root: (root / 'JPEGImages' / 'a.jpg').unlink(), r'lacks the images of 1 of its images: a'),
    (lambda root: (root / 'ImageSets' / 'Main' / 'train.txt').write_text('\n', encoding='utf-8'),
     r'train\.txt lists no images'),
    (lambda root: (root / 'classes.txt').write_text('cat\n', encoding='utf-8'),
     r'classes\.txt lacks the classes dog of the objects'),
    (lambda root: (root / 'classes.txt').write_text('dog\ndog\n', encoding='utf-8'),
     r'classes\.txt has a class twice')])
def test_broken_voc_data_are_refused_in_one_line(tmp_path, change, message):
    change(write_voc(tmp_path, dict(a=[DOG])))
    with pytest.raises(DataError, match=message) as caught:
        read_voc(tmp_path, 'train')
    assert '\n' not in str(caught.value)


def test_difficult_objects_are_not_trained_on(tmp_path):
    data = select_training(read_voc(write_voc(tmp_path, dict(
        a=[DOG, (*CAT[:5], 1)], b=[(*DOG[:5], 1)], c=[], d=[('dog', 5, 5, 5, 9, 0)])), 'train'))
    assert [image.path.stem for image in data.images] == ['a', 'c', 'd']
    assert [len(image.objects) for image in data.images] == [1, 0, 0]
    notes = ' '.join(data.notes)
    assert 'boxes without width or height in the image were dropped: annotations d:1' in notes
    assert '2 difficult objects are not trained on' in notes and 'nothing but difficult objects' in notes
    assert 'all objects have one class, dog' in notes and 'without objects, which are not learnt: aeroplane' in notes
    with pytest.raises(DataError, match='1 objects have no segmentation, which masks need: annotations a:1'):
        encode_masks(data)


# Average precision ----------------------------------------------------------------------------------------------------

def detect(image: int, box: list, score: float, category: int = 12) -> dict:
    return dict(image_id=image, category_id=category, bbox=box, score=score)


def test_precision_is_that_computed_by_hand(tmp_path):
    """Two dogs; hits at the first and the third detection: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1."""
    data = read_voc(write_voc(tmp_path, dict(a=[DOG], b=[DOG], c=[])), 'train')
    assert data.categories[12] == 'dog'
    box = [10, 5, 30, 25]
    found = [detect(1, box, .9), detect(3, box, .8), detect(2, box, .7)]
    assert voc_average_precision(data, found) == dict(
        AP50=pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3)), AP50_11=pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11))
    assert voc_average_precision(data, found[::-1]) == voc_average_precision(data, found)
    assert voc_average_precision(data, found[:1])['AP50'] == pytest.approx(50)
    assert voc_average_precision(data, [detect(1, box, .9, category=8)])['AP50'] == 0  # a cat
    assert voc_average_precision(data, [])['AP50_11'] == 0


def test_repeated_detections_are_wrong_and_difficult_objects_do_not_count(tmp_path):
    data = read_voc(write_voc(tmp_path, dict(a=[DOG, ('dog', 51, 6, 71, 31, 1)])), 'train')
    box, difficult = [10, 5, 30, 25], [50, 5, 20, 25]
    assert voc_average_precision(data, [detect(1, difficult, .9), detect(1, box, .8)])['AP50'] == 100
    found = [detect(1, [30, 5, 10, 25], .9), detect(1, box, .8), detect(1, box, .7)]  # wrong, right, repeated
    assert voc_average_precision(data, found)['AP50'] == pytest.approx(50)
    only = read_voc(write_voc(tmp_path / 'b', dict(a=[(*DOG[:5], 1)])), 'train')
    assert voc_average_precision(only, found) == dict(AP50=None, AP50_11=None)


def test_boxes_include_their_last_pixel(tmp_path):
    """20 x 10 pixels of which 10 x 10 are found: an IoU of exactly 1/2, which is enough; 9 x 9 of 19 x 9 is not."""
    data = read_voc(write_voc(tmp_path, dict(a=[('dog', 1, 1, 20, 10, 0)])), 'train')
    assert voc_average_precision(data, [detect(1, [0, 0, 9, 9], .9)])['AP50'] == 100
    assert voc_average_precision(data, [detect(1, [0, 0, 8.9, 9], .9)])['AP50'] == 0


def test_the_scripts_take_voc(tmp_path, monkeypatch, capsys):
    root = write_voc(tmp_path / 'data', dict(a=[('pear', 11, 6, 41, 31, 0)], b=[('fig', 1, 1, 9, 9, 1)]), 'val')
    torch.manual_seed(0)
    options = dict(channels=16, min_size=64, max_size=96, model_args=dict(depths=[1, 1, 1, 1]))
    models = dict(faster_rcnn=dict(hidden=32, proposals=20, score_thresh=0.),
                  mask_rcnn=dict(hidden=32, mask_convs=1, proposals=20))
    for task, more in models.items():
        model = create_dense_model(task, 'casvit_xs', 2, **options, **more)
        save_checkpoint(tmp_path / f'{task}.pth', model, ['fig', 'pear'])

    def run(task: str) -> tuple:
        monkeypatch.setattr('sys.argv', ['validate.py', str(tmp_path / f'{task}.pth'), str(root), '--json',
                                         '--device', 'cpu'])
        return main(), *capsys.readouterr()
    code, out, _ = run('faster_rcnn')
    scores = json.loads(out)
    assert code == 0 and 0 <= scores['voc']['AP50_11'] <= 100 and scores['classes']['fig'] is None
    code, _, err = run('mask_rcnn')
    assert code == 2 and '2 objects have no segmentation' in err
    assert caretrans_main(['inspect', str(root), '--split', 'val']) == 0
    out = capsys.readouterr().out
    assert '2 images (0 without objects), 2 objects, 2 classes' in out
    assert '1 images have nothing but difficult objects and are not trained on: b.jpg' in out
