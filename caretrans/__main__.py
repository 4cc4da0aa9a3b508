"""Small commands: python -m caretrans predict | convert | shard | bench-loader | compare. See --help of each."""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .checkpoint import LAYOUTS, convert_checkpoint
from .config import CROP_MODES, number
from .data.datasets import CHANNEL_ORDERS
from .errors import CheckpointError, ConfigError, DataError
from .progress import show_messages


def _parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m caretrans', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    predict = commands.add_parser('predict', help='name what is on images')
    predict.add_argument('images', nargs='+', help='image files, and folders of them')
    predict.add_argument('--checkpoint', required=True, help='.pth, .pth.tar or .safetensors, published or of train.py')
    predict.add_argument('--model', dest='model_name', help='where the checkpoint does not say it')
    predict.add_argument('--entry', help='entry of the file that holds the weights, e.g. state_dict_ema')
    predict.add_argument('--topk', type=number(int, 1), default=5, help='how many classes per image (default: 5)')
    _add_preparation(predict)
    predict.add_argument('--device', default='auto', help='cpu, cuda, mps or auto')
    predict.add_argument('--json', action='store_true', help='print one JSON object per image')

    convert = commands.add_parser('convert', help='rewrite a checkpoint in another layout or format')
    convert.add_argument('source')
    convert.add_argument('target', help='.pth, .pth.tar or .safetensors decides the format')
    convert.add_argument('--to', dest='layout', required=True, choices=LAYOUTS, help='of keys')
    convert.add_argument('--entry', help='entry of the source that holds the weights')
    convert.add_argument('--model', dest='model_name', help='where the source does not say it, or with a tag')
    _add_preparation(convert.add_argument_group(
        'how it is evaluated', 'written down by --to caretrans, where a network for BGR images becomes one for RGB '
        'images; --to published takes --img-size, which checkpoints of MLLA are tied to'))
    convert.add_argument('--overwrite', action='store_true', help='replace the target')
    _add_shard(commands)
    _add_bench_loader(commands)
    commands.add_parser('compare', add_help=False, help='train models on equal terms: accuracy against latency')
    return parser.parse_args(argv)


def _add_preparation(command: Any) -> None:
    command.add_argument('--img-size', type=number(int, 32), help='side of the images, pixels')
    command.add_argument('--crop-pct', type=number(float, 0.01, 1), help='centre crop as a share of the image')
    command.add_argument('--crop-mode', choices=CROP_MODES,
                         help='crop the centre, squash the whole image to a square (CAS-ViT from 384 pixels on), or '
                              'border; by default of the checkpoint')
    command.add_argument('--channel-order', choices=CHANNEL_ORDERS,
                         help='by default of the checkpoint, else rgb; published files of CAS-ViT may need bgr')
    command.add_argument('--interpolation', choices=['bicubic', 'bilinear', 'nearest', 'lanczos'], help='of resizing')


def _add_shard(commands: Any) -> None:
    shard = commands.add_parser(
        'shard', help='write a folder of images as WebDataset shards; run again, it goes on where it was interrupted')
    shard.add_argument('source', help='folder with train/CLASS/*.jpg and val/CLASS/*.jpg')
    shard.add_argument('target', help='folder of the shards; then: bash cmd/train.sh TARGET')
    shard.add_argument('--split', dest='splits', nargs='+', default=['train', 'val'], help='(default: train val)')
    size = shard.add_mutually_exclusive_group()
    size.add_argument('--images-per-shard', type=number(int, 1), help='at most; by default as --shard-size gives it')
    size.add_argument('--shard-size', type=number(float, 0.01), default=100., help='megabytes (default: 100)')
    shard.add_argument('--workers', type=number(int, 1), default=4, help='shards written at a time (default: 4)')
    shard.add_argument('--seed', type=int, default=0, help='of the order of the images (default: 0)')


def _add_bench_loader(commands: Any) -> None:
    bench = commands.add_parser(
        'bench-loader', help="images/s of the training loader alone, against timm's default loader, in turns")
    bench.add_argument('data', nargs='?', help='folder with train/CLASS/*.jpg; by default photographs are made')
    bench.add_argument('--photos', nargs='+', help='files and folders to make the photographs of (default: fruit14)')
    bench.add_argument('--photo-size', type=number(int, 8), nargs=2, default=[500, 400], help='(default: 500 400)')
    bench.add_argument('--workers', type=number(int, 0), default=1, help='processes (default: 1)')
    bench.add_argument('--img-size', type=number(int, 32), default=224, help='pixels (default: 224)')
    bench.add_argument('--batch-size', type=number(int, 1), default=64, help='(default: 64)')
    bench.add_argument('--rounds', type=number(int, 1), default=7, help='of each loader (default: 7)')
    bench.add_argument('--images', type=number(int, 1), default=1024, help='of each round, at least (default: 1024)')
    bench.add_argument(
        '--auto-augment', nargs='+', default=['', 'rand-m9-mstd0.5-inc1'],
        help="timm's names of policies, '' for crop and flip alone (default: both that and rand-m9-mstd0.5-inc1)")
    bench.add_argument('--json', action='store_true', help='print one JSON object')


def _predict(as_json: bool, device: str, **options) -> int:
    from .devices import resolve_device
    from .evaluation.predict import predict_images

    failed = 0
    for result in predict_images(device=resolve_device(device), **options):
        if as_json:
            print(json.dumps(result))
        elif 'error' not in result:
            print(result['image'])
            for name, probability in zip(result['classes'], result['probabilities'], strict=True):
                print(f'  {100 * probability:5.1f} %  {name}')
        if 'error' in result:
            failed += 1
            print(f'{result["image"]}: {result["error"]}', file=sys.stderr)
    return 1 if failed else 0


def _shard(**options: Any) -> int:
    from .data.shards import write_shards

    for split, info in write_shards(**options).items():
        print(f'{split}: {info["num_samples"]} images in {len(info["filenames"])} shards')
    return 0


def _bench_loader(as_json: bool, **options: Any) -> int:
    from .bench.loader import bench_loader, describe_bench

    result = bench_loader(**options)
    print(json.dumps(result) if as_json else describe_bench(result))
    return 0


def _compare(argv: Sequence[str]) -> int:
    from .bench.comparison import main as compare

    return compare(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv[:1] == ['compare'] else ''  # its flags are those of train.py, and more
    options = {} if command else vars(_parse_flags(argv))
    command = command or options.pop('command')
    show_messages()
    try:
        if command == 'compare':
            return _compare(argv[1:])
        if command == 'predict':
            return _predict(options.pop('json'), **options)
        if command == 'shard':
            return _shard(**options)
        if command == 'bench-loader':
            return _bench_loader(options.pop('json'), **options)
        print(convert_checkpoint(**options))
        return 0
    except BrokenPipeError:  # the reader, `head` for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, ConfigError, DataError) as error:
        print(f'caretrans {command}: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
