"""ImageNet from its archives, on a miniature: extraction, resuming, and refusals of one line."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
import miniature_ilsvrc
from miniature_ilsvrc import (
    TRAIN_IMAGES, VAL_IDS, WNIDS, build_miniature, pack, pack_devkit, run as main, train_tars, val_images)

from caretrans.data import imagenet, list_classes, open_dataset
from caretrans.data.imagenet import ILSVRC2012, Record, read_devkit

ROOT = Path(imagenet.__file__).parents[2]
SLOW = """import builtins, time
real = builtins.open
def slow(file, mode='r', *args, **kwargs):
    time.sleep(0.15 if mode == 'xb' else 0)
    return real(file, mode, *args, **kwargs)
builtins.open = slow
"""


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A miniature that no test changes."""
    return build_miniature(tmp_path_factory.mktemp('whole'))


@pytest.fixture
def target(tmp_path):
    return tmp_path / 'to [train]* on'


def flags(miniature, target, *more):
    return [str(flag) for flag in (miniature.json, miniature.folder, target, *more)]


def start(*command, slow_in=None):
    """A process in another folder; with `slow_in`, a folder for a patch, each image takes 0.15 s more."""
    paths = [str(ROOT), *([str(slow_in)] if slow_in else [])]
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1',
                   'PYTHONPATH': os.pathsep.join(paths)}
    if slow_in:
        (slow_in / 'sitecustomize.py').write_text(SLOW, encoding='utf-8')
    return subprocess.Popen(
        list(map(str, command)), cwd='/', env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), encoding='utf-8')


def read_tree(folder):
    """What is in train/ and val/, unfinished things too."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for split in ('train', 'val') for path in (folder / split).rglob('*') if path.is_file()}


def read_times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted([folder, *folder.rglob('*')]) if path.name[0] != '.'}


def refusal(capsys, *arguments):
    """The one line that says why the arguments were refused, with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# All is right ---------------------------------------------------------------------------------------------------------

def test_the_layout_of_imagenet_is_made_and_the_archives_are_unchanged(whole, target, capsys):
    contents, times = {path: path.read_bytes() for path in whole.folder.iterdir()}, read_times(whole.folder)
    whole.folder.chmod(0o555)
    assert main(flags(whole, target)) == 0
    whole.folder.chmod(0o755)
    out = capsys.readouterr().out
    assert read_tree(target) == whole.files
    assert (contents, times) == ({path: path.read_bytes() for path in whole.folder.iterdir()}, read_times(whole.folder))
    assert out.splitlines()[-2:] == [f'{target}: train 3 classes, 12 images; val 3 classes, 6 images',
                                     f"next: bash cmd/train.sh '{target}' --recipe care_s0_imagenet"]

    train, val = open_dataset(target, 'train'), open_dataset(target, 'val')
    assert (len(train), len(val)) == (12, 6)
    assert list_classes(train) == list_classes(val) == sorted(WNIDS.values())
    labels = dict(zip(val.filenames(basename=True), (label for _, label in val), strict=True))
    assert [sorted(WNIDS.values())[labels[name]] for name in sorted(labels)] == [WNIDS[val_id] for val_id in VAL_IDS]


def test_the_script_passes_its_arguments_on_and_knows_the_size_of_the_archives(whole, target):
    process = start('bash', ROOT / 'data' / 'extract_ILSVRC.sh', whole.folder, target)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and len(err.splitlines()) == 1
    assert f'{whole.folder}/ILSVRC2012_img_train.tar: has ' in err and ' of 147,897,477,120 bytes' in err
    assert read_tree(target) == {}


def test_a_second_run_opens_no_archive(whole, target, monkeypatch, capsys):
    assert main(flags(whole, target)) == 0
    printed, times = capsys.readouterr().out, read_times(target)
    monkeypatch.setattr(imagenet, 'compute_md5', None)
    monkeypatch.setattr(imagenet, 'list_members', None)
    assert main(flags(whole, target)) == 0
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[-2:]
    assert read_times(target) == times


def test_one_split_alone_needs_its_archive_only(whole, target, tmp_path, capsys):
    shutil.copytree(whole.folder, tmp_path / 'some')
    shutil.move(tmp_path / 'some' / whole.edition.train.name, tmp_path)
    some = whole._replace(folder=tmp_path / 'some')
    assert main(flags(some, target, '--only', 'val')) == 0
    assert read_tree(target).keys() == {name for name in whole.files if name.startswith('val/')}
    assert 'next: the same command without --only' in capsys.readouterr().out
    assert f'{some.folder}/{whole.edition.train.name}: no such archive' in refusal(capsys, *flags(some, target))
    shutil.move(tmp_path / whole.edition.train.name, some.folder)
    (some.folder / whole.edition.val.name).unlink()
    (some.folder / whole.edition.devkit.name).unlink()
    assert main(flags(some, target)) == 0, 'val is complete and needs no archive'
    assert read_tree(target) == whole.files


def test_the_facts_of_ilsvrc_2012_are_those_of_torchvision():
    known = torchvision.datasets.imagenet.ARCHIVE_META
    assert {key: (getattr(ILSVRC2012, key).name, getattr(ILSVRC2012, key).md5) for key in known} == known
    assert (ILSVRC2012.classes, ILSVRC2012.train_images, ILSVRC2012.val_images) == (1000, 1281167, 50000)


# Labels ---------------------------------------------------------------------------------------------------------------

def test_the_devkit_is_read_as_by_torchvision(whole, tmp_path, monkeypatch):
    meta = {'devkit': (whole.edition.devkit.name, whole.edition.devkit.md5)}
    monkeypatch.setattr(torchvision.datasets.imagenet, 'ARCHIVE_META', meta)
    shutil.copy(whole.folder / whole.edition.devkit.name, tmp_path)  # torchvision writes beside it
    torchvision.datasets.imagenet.parse_devkit_archive(tmp_path)
    names, val_wnids = torch.load(tmp_path / 'meta.bin')
    devkit = read_devkit(whole.folder / whole.edition.devkit.name)
    assert [devkit.wnids[int(val_id)] for val_id in devkit.val_ids] == val_wnids
    assert devkit.wnids == WNIDS and devkit.train_images == TRAIN_IMAGES and devkit.train_images.keys() == names.keys()


NAMES = sorted(val_images())
LABELS = {
    'ILSVRC ids': [f'{val_id}' for val_id in VAL_IDS],
    'WordNet ids': [WNIDS[val_id] for val_id in VAL_IDS],
    'pairs': [f'{name} {WNIDS[val_id]}' for name, val_id in reversed(list(zip(NAMES, VAL_IDS, strict=True)))],
    'pairs without ending': [f'{name[:-5]}\t{WNIDS[val_id]}' for name, val_id in zip(NAMES, VAL_IDS, strict=True)],
}


@pytest.mark.parametrize('form', LABELS)
@pytest.mark.parametrize('has_devkit', [True, False])
def test_labels_come_from_a_file_in_any_usual_form(whole, target, tmp_path, capsys, form, has_devkit):
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join(LABELS[form]), encoding='utf-8')
    shutil.copytree(whole.folder, tmp_path / 'some')
    if not has_devkit:
        (tmp_path / 'some' / whole.edition.devkit.name).unlink()
    arguments = flags(whole._replace(folder=tmp_path / 'some'), target, '--val-labels', labels)
    if form == 'ILSVRC ids' and not has_devkit:
        assert 'not in the order of the class folders; the devkit' in refusal(capsys, *arguments)
    else:
        assert main(arguments) == 0 and read_tree(target) == whole.files
        times = read_times(target)
        assert main(arguments) == 0 and read_times(target) == times


@pytest.mark.parametrize('lines, message', [
    (LABELS['WordNet ids'][:5], 'has 5 labels for 6 images'),
    (LABELS['WordNet ids'][:5] + ['dog'], "label 6 is 'dog'"),
    (LABELS['ILSVRC ids'][:5] + ['4'], "label 6 is '4'"),
    (LABELS['pairs'][:5] + ['other.JPEG n01440764'], 'has no label for ILSVRC2012_val_00000001.JPEG'),
    (['n02119789'] * 3 + ['n03000684'] * 3, '2 of 3 classes: missing n01440764; unexpected none'),
    (['n02119789', 'n03000684', 'n09999999'] * 2, '3 of 3 classes: missing n01440764; unexpected n09999999'),
    (None, 'cannot be read'),
])
def test_labels_of_other_images_are_refused(whole, target, tmp_path, capsys, lines, message):
    if lines is not None:
        (tmp_path / 'labels.txt').write_text('\n'.join(lines), encoding='utf-8')
    assert message in refusal(capsys, *flags(whole, target, '--val-labels', tmp_path / 'labels.txt'))
    assert read_tree(target) == {}


def test_without_labels_the_remedy_is_named(whole, target, tmp_path, capsys):
    shutil.copytree(whole.folder, tmp_path / 'some')
    (tmp_path / 'some' / whole.edition.devkit.name).write_bytes(b'')
    assert 'has 0 of' in refusal(capsys, *flags(whole._replace(folder=tmp_path / 'some'), target))
    (tmp_path / 'some' / whole.edition.devkit.name).unlink()
    assert '--val-labels FILE' in refusal(capsys, *flags(whole._replace(folder=tmp_path / 'some'), target))
    broken = build_miniature(tmp_path / 'broken', devkit=pack_devkit()[:200])
    assert 'cannot be read as devkit' in refusal(capsys, *flags(broken, target))


# Interruption ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('split, sent', [
    ('train', signal.SIGKILL), ('val', signal.SIGKILL), ('train', signal.SIGINT)])
def test_after_a_kill_the_same_command_completes_the_target(whole, tmp_path, capsys, split, sent):
    data = tmp_path / 'archives and target'
    shutil.copytree(whole.folder, data)
    arguments = [whole.json, '--folder', data, '--workers', 1]
    command = [sys.executable, miniature_ilsvrc.__file__, *arguments]
    process, deadline = start(*command, slow_in=tmp_path), time.monotonic() + 120
    while not any((data / split).glob('.n*.partial/*')):
        assert process.poll() is None and time.monotonic() < deadline, 'it ended before it could be interrupted'
        time.sleep(0.005)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    left = read_tree(data)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 130)
    assert any('.partial/' in name for name in left) == (sent == signal.SIGKILL)
    assert len(left) < 18 and set(left) != set(whole.files)
    if sent == signal.SIGINT:
        assert err == 'extract_ILSVRC.sh: stopped; run the same command again to resume\n'
    capsys.readouterr()
    assert main(arguments) == 0
    assert sent == signal.SIGKILL or 'MD5' not in capsys.readouterr().out
    assert read_tree(data) == whole.files


@pytest.mark.parametrize('workers', [1, 4])
def test_an_interruption_at_any_image_can_be_resumed(whole, tmp_path, monkeypatch, workers):
    copy, lock = imagenet._copy, threading.Lock()
    for last in range(1, 19, workers):
        target, left = tmp_path / str(last), iter(range(last))

        def copy_or_stop(*arguments, left=left):
            with lock:
                remaining = next(left, None) is not None
            if not remaining:
                raise KeyboardInterrupt
            copy(*arguments)
        monkeypatch.setattr(imagenet, '_copy', copy_or_stop)
        stopped = main(flags(whole, target, '--workers', workers))
        assert stopped == (130 if last < 18 else 0) and set(read_tree(target)) <= set(whole.files)
        monkeypatch.setattr(imagenet, '_copy', copy)
        assert main(flags(whole, target)) == 0 and read_tree(target) == whole.files


def test_folders_that_the_record_does_not_know_are_compared_with_the_archives(whole, target, capsys):
    assert main(flags(whole, target)) == 0
    times, record = read_times(target / 'train'), target / '.imagenet.jsonl'
    lines = sorted(record.read_text(encoding='utf-8').splitlines(), key=lambda line: 'train/n01440764' in line)
    for text in ('\n'.join(lines)[:-9], ''):  # the last line cut short, and no line at all
        record.write_text(text, encoding='utf-8')
        assert main(flags(whole, target)) == 0
        assert read_times(target / 'train') == times and read_tree(target) == whole.files
        with Record(target) as known:
            assert len(known.entries) == 9
    image = next((target / 'train' / 'n01440764').iterdir())
    image.write_bytes(image.read_bytes()[:-1])
    assert f'{target}/train/n01440764: has other files than the archive' in refusal(capsys, *flags(whole, target))
    shutil.rmtree(target / 'train' / 'n01440764')
    assert main(flags(whole, target)) == 0 and read_tree(target) == whole.files


def test_two_runs_at_a_time_are_refused(whole, target, capsys):
    with Record(target):
        assert 'another extraction into it is running' in refusal(capsys, *flags(whole, target))


# Archives that are not right ------------------------------------------------------------------------------------------

def break_header(tar):
    with tarfile.open(fileobj=BytesIO(tar)) as members:
        second = members.getmembers()[1].offset
    return tar[:second] + b'\x07' * 512 + tar[second + 512:]


def break_start(tar): return b'no tar at all' * 1000  # noqa: E704
def cut_short(tar): return tar[:len(tar) // 2 // 512 * 512]  # noqa: E704
def empty(tar): return pack({})  # noqa: E704
def nothing(tar): return b''  # noqa: E704


@pytest.mark.parametrize('damage', [break_header, break_start, cut_short, empty, nothing])
def test_a_damaged_class_is_named_and_the_complete_ones_stay(whole, target, tmp_path, capsys, damage):
    tars = train_tars()
    tars['n03000684.tar'] = damage(tars['n03000684.tar'])
    broken = build_miniature(tmp_path / 'broken', train=pack(tars))
    line = refusal(capsys, *flags(broken, target, '--workers', 1))
    assert 'train, class n03000684: ' in line and 'again, then run the same command again' in line
    left = read_tree(target)
    assert set(left) == {name for name in whole.files if name.startswith('train/n02119789')}
    times = read_times(target / 'train' / 'n02119789')
    assert main(flags(whole, target)) == 0 and read_tree(target) == whole.files
    assert read_times(target / 'train' / 'n02119789') == times


def test_a_class_whose_tar_has_no_end_mark_is_complete(target, tmp_path):
    tars = train_tars()
    with tarfile.open(fileobj=BytesIO(tars['n03000684.tar'])) as tar:
        last = tar.getmembers()[-1]
    tars['n03000684.tar'] = tars['n03000684.tar'][:last.offset_data + -(-last.size // 512) * 512]
    bare = build_miniature(tmp_path / 'bare', train=pack(tars))
    assert main(flags(bare, target)) == 0 and read_tree(target) == bare.files


def test_a_missing_class_is_named(target, tmp_path, capsys):
    tars = train_tars()
    del tars['n03000684.tar']
    broken = build_miniature(tmp_path / 'broken', train=pack(tars))
    assert '2 of 3 classes: missing n03000684; unexpected none' in refusal(capsys, *flags(broken, target))
    (broken.folder / broken.edition.devkit.name).unlink()
    assert '2 of 3 classes. ' in refusal(capsys, *flags(broken, target, '--only', 'train'))
    assert read_tree(target) == {}


def test_a_wrong_checksum_names_both_sums_and_skipping_warns(whole, target, tmp_path, capsys):
    shutil.copytree(whole.folder, tmp_path / 'some')
    path = tmp_path / 'some' / whole.edition.val.name
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    some = whole._replace(folder=tmp_path / 'some')
    line, found = refusal(capsys, *flags(some, target)), hashlib.md5(data).hexdigest()
    assert f'{path}: its MD5 is {found}, not {whole.edition.val.md5}' in line and read_tree(target) == {}
    assert main(flags(some, target, '--skip-checksums')) == 0
    assert 'CHECKSUMS ARE SKIPPED' in capsys.readouterr().err
    assert f'its MD5 is {found}' in refusal(capsys, *flags(some, target)), 'the skipped checksum is made up for'
    path.write_bytes(data[:-512])
    shutil.rmtree(target)
    assert 'has 50,688 of 51,200 bytes' in refusal(capsys, *flags(some, target))


@pytest.mark.parametrize('key', ['train', 'val', 'inner'])
@pytest.mark.parametrize('name, kind', [
    ('/absolute.JPEG', tarfile.REGTYPE), ('../outside.JPEG', tarfile.REGTYPE),
    ('a/../../outside.JPEG', tarfile.REGTYPE), ('..', tarfile.DIRTYPE), ('link.JPEG', tarfile.SYMTYPE),
    ('link.JPEG', tarfile.LNKTYPE), ('device.JPEG', tarfile.CHRTYPE), ('pipe.JPEG', tarfile.FIFOTYPE),
    ('below/image.JPEG', tarfile.REGTYPE), ('program.sh', tarfile.REGTYPE),
])
def test_unsafe_members_are_refused(target, tmp_path, capsys, key, name, kind):
    name = name.replace('.JPEG', '.tar') if key == 'train' else name
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, '/etc/passwd'
    evil = info.tobuf(tarfile.GNU_FORMAT)
    tars = train_tars()
    if key == 'inner':
        tars['n01440764.tar'] = evil + tars['n01440764.tar']
    replaced = {'train': pack(tars), 'val': pack(val_images())}
    if key != 'inner':
        replaced[key] = evil + replaced[key]
    line = refusal(capsys, *flags(build_miniature(tmp_path / 'evil', **replaced), target))
    assert repr(name) in line and 'is refused' in line
    assert not (target / 'train' / 'n01440764').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['evil', target.name], 'nothing outside the target'


def test_counts_that_do_not_match_are_listed_by_class(target, tmp_path, capsys):
    tars = train_tars()
    with tarfile.open(fileobj=BytesIO(tars['n01440764.tar'])) as tar:
        tars['n01440764.tar'] = pack({info.name: tar.extractfile(info).read() for info in tar.getmembers()[1:]})
    few = build_miniature(tmp_path / 'few', train=pack(tars))
    line = refusal(capsys, *flags(few, target))
    assert '3 classes with 11 images, not 3 with 12; differing: n01440764 4 instead of 5.' in line
    few = build_miniature(tmp_path / 'fewer', val=pack(dict(list(val_images().items())[1:])))
    assert 'has 5 of 6 images' in refusal(capsys, *flags(few, target))


# Folders that are not right -------------------------------------------------------------------------------------------

def test_too_little_space_is_noticed_before_anything_is_done(whole, target, monkeypatch, capsys):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10 ** 7))
    line = refusal(capsys, *flags(whole, target))
    assert f'{target}: 0.1 GB are needed, 0.0 GB free' in line and read_tree(target) == {}


def test_other_things_in_the_target_are_refused_and_kept(whole, target, capsys):
    (target / 'val').mkdir(parents=True)
    (target / 'val' / 'ILSVRC2012_val_00000001.JPEG').write_bytes(b'flat')
    assert 'files outside of class folders (ILSVRC2012_val_00000001.JPEG)' in refusal(capsys, *flags(whole, target))
    (target / 'val' / 'ILSVRC2012_val_00000001.JPEG').unlink()
    (target / 'train' / 'apple').mkdir(parents=True)
    assert 'folders of other data (apple)' in refusal(capsys, *flags(whole, target))
    assert (target / 'train' / 'apple').is_dir()


def test_a_target_that_cannot_be_written_is_one_line(whole, target, monkeypatch, capsys):
    target.write_text('a file', encoding='utf-8')
    assert f'{target}: ' in refusal(capsys, *flags(whole, target))
    target.unlink()

    def fill_up(*arguments):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(imagenet, '_copy', fill_up)
    assert '[Errno 28] No space left on device: make room' in refusal(capsys, *flags(whole, target))


def test_labels_without_their_split_are_refused(whole, target):
    with pytest.raises(SystemExit):
        main(flags(whole, target, '--only', 'train', '--val-labels', 'labels.txt'))
