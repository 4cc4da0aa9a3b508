"""Files of detectors and segmenters: published ones load, ours load, and both become the other."""
import pytest
import torch
from golden import LAYOUTS, filled, layout, published_file

from caretrans.checkpoint import CheckpointError, read_checkpoint
from caretrans.dense import convert_checkpoint, create_dense_model, create_from_checkpoint, save_checkpoint
from caretrans.errors import ConfigError


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize('task', LAYOUTS)
def test_a_published_file_becomes_ours_and_published_again(task, tmp_path):
    source = published_file(task, tmp_path, CLASSES=tuple(f'class {i}' for i in range(80)) if task != 'semantic_fpn'
                            else tuple(f'class {i}' for i in range(150)))
    ours, back = tmp_path / 'ours.pth', tmp_path / 'back.pth'
    convert_checkpoint(source, ours, 'caretrans')
    summary = convert_checkpoint(ours, back, 'published')
    assert summary.startswith(f'{task} with casvit_xs, ')
    written = read_checkpoint(back)
    expected = filled(LAYOUTS[task])
    if task == 'retinanet':  # takes strides from 8 on: the norm of stride 4 is not part of it
        changed = {key for key in expected if not torch.equal(written.state_dict[key], expected[key])}
        assert changed and all(key.startswith('backbone.norm0.') for key in changed)
        expected.update({key: written.state_dict[key] for key in changed})
    assert equal(written.state_dict, expected) and len(expected) == len(layout(LAYOUTS[task]))
    assert written.meta['meta']['CLASSES'][-1].startswith('class ')
    first, second = create_from_checkpoint(source)[0], create_from_checkpoint(ours)[0]
    assert equal(first.state_dict(), second.state_dict())


def test_a_file_of_ours_keeps_what_it_was_made_with(tmp_path):
    model = create_dense_model('mask_rcnn', 'care_s0', 3, last_map='residual', channels=32, hidden=64, mask_convs=2,
                               min_size=192, model_args=dict(drop_path_rate=.1))
    save_checkpoint(tmp_path / 'x.pth', model, ['a', 'b', 'c'], epoch=2)
    loaded, checkpoint = create_from_checkpoint(tmp_path / 'x.pth')
    assert equal(loaded.state_dict(), model.state_dict()) and loaded.transform.min_size == (192,)
    assert checkpoint.meta['class_names'] == ['a', 'b', 'c'] and checkpoint.meta['epoch'] == 2
    with pytest.raises(CheckpointError, match='no published layout for dense tasks'):
        convert_checkpoint(tmp_path / 'x.pth', tmp_path / 'y.pth', 'published')


def test_a_detector_of_mlla_becomes_published_and_ours_again(tmp_path):
    """No layout of one was at hand: its backbone has that of mlla_t_fork_feat, neck and heads those of mmdet."""
    model = create_dense_model('mask_rcnn', 'mlla_t', 2, channels=16, hidden=32, mask_convs=1)
    save_checkpoint(tmp_path / 'ours.pth', model)
    convert_checkpoint(tmp_path / 'ours.pth', tmp_path / 'published.pth', 'published')
    written = read_checkpoint(tmp_path / 'published.pth').state_dict
    assert {key.removeprefix('backbone.') for key in written if key.startswith('backbone.')} == set(
        key for key in layout('mlla_t_fork_feat') if not key.endswith('.rotations'))  # tables for one size
    loaded, _ = create_from_checkpoint(tmp_path / 'published.pth')
    background = ('bbox_pred', 'mask_fcn_logits')  # rows that mmdet does not have
    assert loaded.dense_config['backbone'] == 'mlla_t' and equal(
        {key: value for key, value in loaded.state_dict().items() if not any(name in key for name in background)},
        {key: value for key, value in model.state_dict().items() if not any(name in key for name in background)})


def test_files_that_do_not_fit_are_refused(tmp_path):
    weights = filled(LAYOUTS['semantic_fpn'])
    for change, message in (
            (lambda w: w.pop('neck.fpn_convs.1.conv.weight'), '1 missing: backbone.fpn.layer_blocks.1.0.weight'),
            (lambda w: w.update(extra=torch.zeros(1)), '1 unexpected: extra'),
            (lambda w: w.update({'decode_head.conv_seg.bias': torch.zeros(7)}), r'1 of wrong shape: classifier.weight'),
            (lambda w: [w.pop(key) for key in list(w) if 'backbone.' in key], 'backbone is none of ours'),
            (lambda w: w.pop('decode_head.conv_seg.bias'), 'is no detector or segmenter')):
        changed = dict(weights)
        change(changed)
        torch.save(dict(state_dict=changed), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=message):
            create_from_checkpoint(tmp_path / 'x.pth')


def test_unknown_tasks_and_options_are_named():
    with pytest.raises(ConfigError, match="no task 'yolo'"):
        create_dense_model('yolo', 'care_s0', 3)
    with pytest.raises(ConfigError, match='chanels'):
        create_dense_model('semantic_fpn', 'care_s0', 3, chanels=3)
    with pytest.raises(ConfigError, match='num_classes is 0'):
        create_dense_model('retinanet', 'care_s0', 0)
