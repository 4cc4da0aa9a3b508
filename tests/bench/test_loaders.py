"""The benchmark of the training loader, in process, on a few images."""
import json

from photos import copy_images

from caretrans.__main__ import main
from caretrans.bench.loaders import bench_loader, describe_bench


def test_both_loaders_take_turns(tmp_path, capsys):
    data = copy_images(tmp_path, per_class=4)
    assert main(['bench-loader', str(data), '--workers', '0', '--images', '16', '--rounds', '2', '--img-size', '32',
                 '--batch-size', '4', '--auto-augment', '', '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    policy, = result['policies']
    assert result['files'] == 16 and result['images'] == 16 and result['machine']['cores'] > 0
    for name in ('ours', 'timm', 'ratio'):
        assert len(policy[name]['rounds']) == 2
        assert 0 < policy[name]['least'] <= policy[name]['median'] <= policy[name]['most']


def test_the_bundled_images_are_the_default_and_policies_have_rows():
    bench = bench_loader(workers=0, img_size=32, batch_size=4, rounds=1, images=8, auto_augment=['', 'rand-m9'])
    text = describe_bench(bench)
    assert bench.files > 1000 and '| crop, flip | ' in text and '| crop, flip, rand-m9 | ' in text


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert main(['bench-loader', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
