"""benchmark.py --bench dense: parameters, multiply-adds and time of whole detectors and segmenters."""
import csv
import json

import pytest
import torch

import benchmark
from caretrans.bench.config import BenchConfig, parse_bench_config
from caretrans.bench.dense import CLASSES, MASKS, PROPOSALS, SIZES, FixedWork, count_cost, measure_dense
from caretrans.bench.record import BenchResult
from caretrans.errors import ConfigError

SIZE = (64, 96)


@pytest.fixture(scope='module')
def costs():
    return {task: count_cost(task, 'casvit_xs', SIZE)[1] for task in CLASSES}


def test_parameters_are_those_of_the_published_layouts(costs):
    found = {task: round(cost.parameters / 1e6, 2) for task, cost in costs.items() if task != 'faster_rcnn'}
    assert found == dict(retinanet=12.19, mask_rcnn=22.78, semantic_fpn=6.88)


def test_multiply_adds_are_those_of_the_heads_on_all_boxes(costs):
    box_head = PROPOSALS * (256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 81))
    conv, upsampling, last = 4 * 14 ** 2 * 9 * 256 ** 2, 4 * 14 ** 2 * 256 ** 2, 28 ** 2 * 256 * 81
    assert 1e9 * (costs['mask_rcnn'].gmacs - costs['faster_rcnn'].gmacs) == pytest.approx(
        MASKS * (conv + upsampling + last))
    places = sum(64 * 96 // stride ** 2 for stride in (4, 8, 16, 32))
    lateral = sum(64 * 96 // stride ** 2 * 256 * chs for stride, chs in ((4, 48), (8, 56), (16, 112), (32, 220)))
    proposals = places + 1 * 2  # and P6, of 1 x 2
    rest = lateral + places * 9 * 256 ** 2 + proposals * (9 * 256 ** 2 + 256 * 15)
    assert 1e9 * (costs['faster_rcnn'].gmacs - costs['faster_rcnn'].gmacs_backbone) == pytest.approx(box_head + rest)


def test_work_is_what_the_model_computes():
    work, cost = count_cost('semantic_fpn', 'casvit_xs', SIZE)
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(work(x), work.model.raw(x)) and cost.gmacs > cost.gmacs_backbone > 0
    boxes = FixedWork(work.model, SIZE).boxes
    assert len(boxes) == PROPOSALS and (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
    assert (boxes.max(0).values <= torch.tensor([96, 64, 96, 64])).all()


def test_a_run_writes_its_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', [
        'benchmark.py', '--bench', 'dense', '--task', 'semantic_fpn', '--model', 'casvit_xs', 'care_s0', '--device',
        'cpu', '--img-size', '64', '--runs', '2', '--warmup', '1', '--output', str(tmp_path)])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    assert '150 (semantic_fpn)' in printed and 'two-stage' not in printed
    rows = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8'))['dense']
    assert [(row['model'], row['height'], row['runs']) for row in rows] == [('casvit_xs', 64, 2), ('care_s0', 64, 2)]
    assert all(0 < row['p10_ms'] <= row['median_ms'] <= row['p90_ms'] for row in rows)
    with open(tmp_path / 'dense.csv', newline='', encoding='utf-8') as file:
        assert [row['task'] for row in csv.DictReader(file)] == ['semantic_fpn'] * 2


def test_a_backbone_that_does_not_fit_is_a_failure_and_the_others_are_measured():
    config = parse_bench_config(['--bench', 'dense', '--task', 'semantic_fpn', '--img-size', '64', '--runs', '1'])
    result = BenchResult('cpu')
    measure_dense(config, ['vit_tiny_patch16_224', 'casvit_xs'], torch.device('cpu'), result, None)
    assert [cost.model for cost in result.dense] == ['casvit_xs'] and result.dense[0].median_ms > 0
    assert len(result.failures) == 1 and 'semantic_fpn with vit_tiny_patch16_224 at 64 x 64' in result.failures[0]


def test_sizes_and_flags():
    assert SIZES['mask_rcnn'] == (800, 1280) and SIZES['semantic_fpn'] == (512, 512)
    assert BenchConfig(bench='dense').default_size and not BenchConfig(bench='dense', img_size=['64']).default_size
    for flags, message in (
            (['--task', 'retinanet'], '--task retinanet with --bench infer: it is for --bench dense; remove it'),
            (['--bench', 'dense', '--task', 'retinanet', 'retinanet'], 'name each once'),
            (['--bench', 'dense', '--batch-size', '2'], '--batch-size 2 with --bench dense'),
            (['--bench', 'dense', '--checkpoint', 'x.pth'], '--checkpoint x.pth with --bench dense'),
            (['--bench', 'dense', '--task', 'yolo'], 'yolo')):
        with pytest.raises(ConfigError, match=message):
            parse_bench_config(flags)
