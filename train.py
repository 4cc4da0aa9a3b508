"""Train a model of caretrans or timm: python train.py DATA --recipe NAME [flags]. See --help and caretrans/recipes."""
import shlex
import sys

import caretrans  # noqa: F401 (registers the models)
from caretrans.config import parse_train_config
from caretrans.distributed import find_processes
from caretrans.errors import CheckpointError, ConfigError, DataError, Preempted, TrainingError
from caretrans.progress import show_messages
from caretrans.training.run import train


def main() -> int:
    is_primary = find_processes().is_primary
    show_messages(is_primary)
    try:
        config = parse_train_config(description=__doc__)
    except ConfigError as error:
        if is_primary:  # the others say the same
            print(f'train.py: {error}', file=sys.stderr)
        return 2
    try:
        result = train(config)
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        if is_primary or not getattr(error, 'is_shared', False):
            print(f'train.py: {error}', file=sys.stderr)
        return 2
    except Preempted as stop:
        if is_primary:
            print(stop)
        return 0
    except KeyboardInterrupt:
        if is_primary:
            print('train.py: stopped; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    if not is_primary:
        return 0
    best = result.best
    print(f'best top-1 {best["val_top1"]:.1f} % after epoch {best["epoch"]}, last {result.last["val_top1"]:.1f} %')
    print(f'curves: {result.folder / "curves.png"}   table: {result.folder / "summary.csv"}')
    print(f'next: bash cmd/eval.sh {shlex.quote(str(result.folder / "best.pth.tar"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
