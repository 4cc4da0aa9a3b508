"""Small commands, each with --help.

python -m caretrans predict|convert|inspect|shard|bench-loader|compare|pretrain|features|probe|page|serve|results
"""
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import LAYOUTS, convert_checkpoint, is_dense, is_pretraining, read_checkpoint
from .devices import resolve_device
from .distributed import is_primary
from .errors import run_command
from .flags import DEVICE_HELP, FlagParser, add_checkpoint_flags, add_weights_flags, check_weights, keep_flags, number
from .progress import show_messages
from .text import escape, write_text
from .strict_json import to_json

PLAIN_CONVERSION = ('source', 'target', 'layout', 'overwrite', 'entry')  # flags without those of classifiers
MAINS = {  # commands that parse their own flags: module, function, help
    'compare': ('bench.compare', 'main', 'train models under equal conditions: accuracy against latency'),
    'pretrain': ('selfsup.commands', 'run_pretrain', 'pre-train a network on images without labels'),
    'features': ('selfsup.commands', 'run_features', 'write features of images, and a sheet of nearest neighbours'),
    'probe': ('selfsup.commands', 'run_probe', 'score features by nearest neighbours and a linear classifier'),
    'page': ('page.build', 'main', 'write a page that measures and runs exported networks in a browser'),
    'serve': ('page.server', 'main', 'serve such a page'),
    'results': ('page.results', 'main', 'check, print and draw latencies measured on phones and in browsers')}


def _build_parser() -> FlagParser:
    parser = FlagParser(prog='python -m caretrans', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    predict = commands.add_parser('predict', help='classify images, or find objects in them')
    predict.add_argument('images', nargs='+', help='image files and folders of images')
    add_weights_flags(predict)
    add_checkpoint_flags(predict)
    predict.add_argument('--topk', type=number(int, 1), default=5, help='classes per image (default: 5)')
    dense = predict.add_argument_group('detectors and segmenters')
    dense.add_argument('--output', help='folder for the drawings (default: runs/predict)')
    dense.add_argument('--score', type=number(float, 0, 1), help='least score of a drawn object (default: 0.5)')
    predict.add_argument('--device', default='auto', help=DEVICE_HELP)

    convert = commands.add_parser('convert', help='write a checkpoint in another layout or format')
    convert.add_argument('source', help='a checkpoint of any layout')
    convert.add_argument('target', help='output file: .pth, .pth.tar or .safetensors')
    convert.add_argument('--to', dest='layout', required=True, choices=(*LAYOUTS, 'detectron2'), help=(
        'layout of the keys; detectron2 for the trunk of a pre-training'))
    add_checkpoint_flags(convert, convert.add_argument_group(
        'preparation of images', 'recorded by --to caretrans, which also turns a network for BGR images into one for '
        'RGB images; --to published accepts only --img-size, on which MLLA checkpoints depend'))
    convert.add_argument('--overwrite', action='store_true', help='replace the target')

    shard = commands.add_parser(
        'shard', help='write a folder of images as WebDataset shards; run it again to resume after an interruption')
    shard.add_argument('source', help='folder with train/CLASS/*.jpg and val/CLASS/*.jpg')
    shard.add_argument('target', help='folder for the shards; train on it with: bash cmd/train.sh TARGET')
    shard.add_argument(
        '--split', dest='splits', nargs='+', default=['train', 'val'], help='splits to write (default: train val)')
    size = shard.add_mutually_exclusive_group()
    size.add_argument('--images-per-shard', type=number(int, 1), help='maximum (default: limited by --shard-size)')
    size.add_argument('--shard-size', type=number(float, 0.01), default=100., help='megabytes (default: 100)')
    shard.add_argument('--workers', type=number(int, 1), default=4, help='shards written in parallel (default: 4)')
    shard.add_argument('--seed', type=int, default=0, help='seed of the image order (default: 0)')
    shard.add_argument('--lmdb', action='store_true', help='one LMDB file per split instead, not shuffled')

    inspect = commands.add_parser('inspect', help='say what is in a folder: images, objects, classes, odd things')
    inspect.add_argument('data', help='folder of classes, in the format of COCO or VOC, or with images and masks')
    inspect.add_argument(
        '--split', dest='splits', nargs='+', default=['train', 'val'], help='splits to look at (default: train val)')

    bench = commands.add_parser('bench-loader', help="images/s of the training loader and of timm's default loader")
    bench.add_argument('data', nargs='?', help='folder with train/CLASS/*.jpg (default: the bundled images)')
    bench.add_argument('--workers', type=number(int, 0), default=1, help='processes (default: 1)')
    bench.add_argument('--img-size', type=number(int, 32), default=224, help='image side in pixels (default: 224)')
    bench.add_argument('--batch-size', type=number(int, 1), default=64, help='(default: 64)')
    bench.add_argument('--rounds', type=number(int, 1), default=7, help='rounds per loader (default: 7)')
    bench.add_argument('--images', type=number(int, 1), default=1024, help='minimum per round (default: 1024)')
    bench.add_argument('--auto-augment', nargs='+', default=['', 'rand-m9-mstd0.5-inc1'], help=(
        "policies by timm's names, '' for crop and flip only (default: '' and rand-m9-mstd0.5-inc1)"))
    for command in (predict, bench):
        command.add_argument('--json', action='store_true', help='print JSON objects')
    for name, (*_, text) in MAINS.items():
        commands.add_parser(name, add_help=False, help=text)
    return parser


def _predict_dense(as_json: bool, device: str, options: dict[str, Any]) -> int:
    from .dense.predict import list_results, predict_images

    given = keep_flags(
        options, ('checkpoint', 'images', 'output', 'score', 'entry'), 'a detector or segmenter', dict(topk=5))
    failed, given = False, dict(dict(output='runs/predict'), **given)
    results: list[dict[str, Any]] = []
    for i, result in enumerate(predict_images(device=resolve_device(device), **given), start=1):
        results += list_results(i, result)
        if as_json:
            print(to_json(result))
        elif 'error' not in result:
            print(escape(f'{result["image"]} -> {result["drawing"]}'))
            for found in result.get('objects', ()):
                left, top, width, height = (round(x) for x in found['bbox'])
                print(f'  {100 * found["score"]:5.1f} %  {escape(found["category"])}  at x {left}, y {top}, '
                      f'{width} x {height}')
            for name, share in result.get('pixels', {}).items():
                print(f'  {100 * share:5.1f} % of the pixels  {escape(name)}')
        if 'error' in result:
            failed = True
            print(f'{escape(result["image"])}: {result["error"]}', file=sys.stderr)
    if results:
        write_text(Path(given['output']) / 'results.json', to_json(results) + '\n')
    return int(failed)


def _predict(as_json: bool, device: str, **options: Any) -> int:
    check_weights(*(options[name] for name in ('checkpoint', 'pretrained', 'model_name', 'entry')))
    if options['checkpoint'] and is_dense(read_checkpoint(options['checkpoint'], options['entry'])):
        return _predict_dense(as_json, device, options)
    from .evaluation.predict import predict_images

    keep_flags({name: options.pop(name) for name in ('output', 'score')}, (), 'a classifier')
    failed = False
    for result in predict_images(device=resolve_device(device), **options):
        if as_json:
            print(to_json(result.to_dict()))
        elif not result.error:
            print(escape(result.image))
            for name, probability in zip(result.classes, result.probabilities, strict=True):
                print(f'  {100 * probability:5.1f} %  {escape(name)}')
        if result.error:
            failed = True
            print(f'{escape(result.image)}: {result.error}', file=sys.stderr)
    return int(failed)


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] in MAINS:
        module, function, _ = MAINS[argv[0]]
        return getattr(importlib.import_module(f'.{module}', __package__), function)(argv[1:])
    options = vars(_build_parser().parse_args(argv))
    command, as_json = options.pop('command'), options.pop('json', False)
    if command == 'predict':
        return _predict(as_json, **options)
    if command == 'shard' and options.pop('lmdb'):
        from .data.lmdb_reader import write_lmdb
        for split in options['splits']:
            target = Path(options['target']) / f'{split}.lmdb'
            print(escape(f'{split}: {write_lmdb(Path(options["source"]) / split, target)} images in {target}'))
    elif command == 'shard':
        from .data.shards import write_shards
        for split, info in write_shards(**options).items():
            print(f'{split}: {info["num_samples"]} images in {len(info["filenames"])} shards')
    elif command == 'inspect':
        from .dense.inspect import describe_data
        for split in options['splits']:
            for line in describe_data(options['data'], split):
                print(escape(line))
    elif command == 'bench-loader':
        from .bench.loaders import bench_loader, describe_bench
        result = bench_loader(**options)
        print(to_json(dataclasses.asdict(result)) if as_json else describe_bench(result))
    elif is_dense(checkpoint := read_checkpoint(options['source'], options['entry'])):
        from .dense import convert_checkpoint as convert_dense
        print(convert_dense(**keep_flags(options, PLAIN_CONVERSION, 'a detector or segmenter')))
    elif is_pretraining(checkpoint):
        from .selfsup import convert_pretraining
        print(convert_pretraining(**keep_flags(options, PLAIN_CONVERSION, 'a pre-training')))
    else:
        print(convert_checkpoint(**options))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    show_messages(is_primary())
    return run_command(' '.join(['caretrans', *argv[:1]]), lambda: _run(argv), is_primary())


if __name__ == '__main__':
    sys.exit(main())
