"""`python -m caretrans predict` and `convert` on detectors and segmenters."""
import json

import pytest
from dense_folders import write_coco
from faster_coco_eval import COCO
from faster_coco_eval.core import mask as rle
import timm
import torch
from photos import FRUIT
from PIL import Image

from caretrans.__main__ import main
from caretrans.checkpoint import CheckpointError, create_from_checkpoint
from caretrans.checkpoint import save_checkpoint as save_classifier
from caretrans.dense import create_dense_model, save_checkpoint
from caretrans.dense import create_from_checkpoint as create_from_dense
from caretrans.dense.evaluate import evaluate_dense
from caretrans.dense.predict import encode_mask, predict_images
from caretrans.errors import EvaluationError


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A file of each kind of model, with random weights."""
    folder, paths = tmp_path_factory.mktemp('dense_models'), {}
    torch.manual_seed(0)
    for task in ('mask_rcnn', 'semantic_fpn'):
        sizes = dict(min_size=96, max_size=128, hidden=32, mask_convs=1, proposals=20, score_thresh=0.) \
            if task == 'mask_rcnn' else dict(head_channels=16)
        model = create_dense_model(task, 'casvit_xs', 2, channels=16, model_args=dict(depths=[1, 1, 1, 1]), **sizes)
        paths[task] = folder / f'{task}.pth'
        save_checkpoint(paths[task], model, ['apple', 'pear'])
    return paths


@pytest.fixture
def images(tmp_path):
    first, second = sorted((FRUIT / 'val').glob('*/*.jpg'))[:2]
    folder = tmp_path / 'images'
    folder.mkdir()
    for name, source in (('a.jpg', first), ('a.png', second)):
        Image.open(source).save(folder / name)
    (folder / 'broken.jpg').write_bytes(b'no image')
    Image.new('RGB', (3000, 1)).save(folder / 'thin.png')
    return folder


def test_a_detector_writes_drawings_and_objects(files, images, tmp_path, capsys):
    code = main(['predict', str(images), '--checkpoint', str(files['mask_rcnn']), '--json', '--score', '0',
                 '--output', str(tmp_path / 'out'), '--device', 'cpu'])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 1 and [('error' in result) for result in results] == [False, False, True, True]
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['a-2.png', 'a.png', 'results.json']
    assert 'cannot be used at 1 x 3000 pixels' in results[3]['error']
    for result in results[:2]:
        original, drawing = Image.open(result['image']), Image.open(result['drawing'])
        assert drawing.size == original.size and drawing.tobytes() != original.convert('RGB').tobytes()
        assert result['objects'] and {found['category'] for found in result['objects']} <= {'apple', 'pear'}
        for found in result['objects']:
            x, y, width, height = found['bbox']
            assert 0 <= x <= x + width <= original.width and 0 <= y <= y + height <= original.height
            mask = found['segmentation']
            assert mask['size'] == [original.height, original.width]
            assert sum(mask['counts']) == original.height * original.width
    written = json.loads((tmp_path / 'out' / 'results.json').read_text(encoding='utf-8'))
    assert [entry['score'] for entry in written] == [found['score'] for result in results[:2]
                                                     for found in result['objects']]
    sizes = [Image.open(result['image']).size for result in results[:2]]
    truth = COCO(dict(
        images=[dict(id=i, width=width, height=height) for i, (width, height) in enumerate(sizes, start=1)],
        categories=[dict(id=0, name='apple'), dict(id=1, name='pear')], annotations=[]))
    read = truth.loadRes(written)  # as scorers read them
    assert sum(rle.area(entry['segmentation']) for entry in read.anns.values()) == sum(
        sum(found['segmentation']['counts'][1::2]) for result in results[:2] for found in result['objects'])


def test_a_segmenter_writes_the_share_of_each_class(files, images, tmp_path, capsys):
    main(['predict', str(images / 'a.jpg'), '--checkpoint', str(files['semantic_fpn']), '--json',
          '--output', str(tmp_path / 'out'), '--device', 'cpu'])
    result = json.loads(capsys.readouterr().out)
    assert set(result['pixels']) <= {'apple', 'pear'} and abs(sum(result['pixels'].values()) - 1) < 1e-6
    assert Image.open(result['drawing']).size == Image.open(result['image']).size


def test_masks_are_encoded_as_coco_encodes_them():
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert encode_mask(mask) == dict(size=[2, 3], counts=[2, 1, 1, 2])
    assert encode_mask(1 - mask) == dict(size=[2, 3], counts=[0, 2, 1, 1, 2])


@pytest.mark.parametrize('arguments, message', [
    (['predict', '{image}', '--checkpoint', '{file}', '--img-size', '64'],
     '--img-size cannot be used with a detector or segmenter: omit it.'),
    (['convert', '{file}', '{file}', '--to', 'published'], 'already exists'),
    (['convert', '{file}', '{other}', '--to', 'mmpretrain'], 'have no mmpretrain layout'),
    (['convert', '{file}', '{other}', '--to', 'published', '--crop-pct', '0.9'], '--crop-pct cannot be used')])
def test_what_does_not_apply_is_refused(files, images, tmp_path, capsys, arguments, message):
    places = dict(image=images / 'a.jpg', file=files['semantic_fpn'], other=tmp_path / 'x.pth')
    assert main([argument.format(**places) for argument in arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err and not (tmp_path / 'x.pth').exists()


def test_a_classifier_takes_no_flags_of_detectors(images, tmp_path, capsys):
    model = timm.create_model('casvit_xs', num_classes=2, depths=(1, 1, 1, 1))
    save_classifier(tmp_path / 'x.pth', model, arch='casvit_xs', model_args=dict(depths=[1, 1, 1, 1]))
    assert main(['predict', str(images), '--checkpoint', str(tmp_path / 'x.pth'), '--score', '0.3']) == 2
    assert '--score cannot be used with a classifier' in capsys.readouterr().err


def test_weights_that_are_not_finite_give_no_answer(files, images, tmp_path, capsys):
    model, _ = create_from_dense(files['semantic_fpn'])
    model.classifier.bias.data[0] = float('nan')
    save_checkpoint(tmp_path / 'x.pth', model)
    assert main(['predict', str(images), '--checkpoint', str(tmp_path / 'x.pth')]) == 2
    assert 'not finite' in capsys.readouterr().err


def test_outputs_of_a_detector_that_overflow_give_no_answer(files, images, tmp_path):
    """torchvision drops boxes that are not finite, so that an image would have no objects."""
    model, _ = create_from_dense(files['mask_rcnn'])
    model.roi_heads.box_predictor.cls_score.weight.data.fill_(3e38)
    save_checkpoint(tmp_path / 'x.pth', model, ['apple', 'pear'])
    found, = predict_images(tmp_path / 'x.pth', [str(images / 'a.jpg')], tmp_path / 'drawings')
    assert 'the outputs of the network are not finite' in found['error']
    with pytest.raises(EvaluationError, match=r'0.png: the outputs of the network are not finite: use --amp off'):
        evaluate_dense(tmp_path / 'x.pth', str(write_coco(tmp_path / 'coco')))


def test_other_commands_name_what_the_file_is(files, tmp_path):
    with pytest.raises(CheckpointError, match='is a detector or segmenter, not a classifier'):
        create_from_checkpoint(files['semantic_fpn'])
