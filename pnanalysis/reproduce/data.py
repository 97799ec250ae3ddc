"""Smaller training sets, for networks that are too large for the machine: the first images of each class."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from pnanalysis.errors import DataError
from pnanalysis.io.atomic import atomic_directory

_FOLDER = "imagefolder:"


def prepare(data: str, n_train: int | None, work: Path) -> str:
    """The data with ``n_train`` training images, the same number of each class, and all test images.

    Parameters
    ----------
    data : str
    n_train : int or None
        ``None`` leaves the data as they are.
    work : Path
        Where to put the folder of the smaller set: its images are links to the files where that is possible.

    Raises
    ------
    DataError
        If the data are no image folder, or have fewer images.
    """
    if n_train is None:
        return data
    if not data.startswith(_FOLDER):
        raise DataError(f"{data}: training on {n_train:,} images needs --data imagefolder:PATH")
    source = Path(data.removeprefix(_FOLDER)).expanduser().resolve()
    files = _chosen(source, n_train)
    target = work / "data" / f"train-{n_train}-{_digest(source, files)}"
    if not target.is_dir():
        with atomic_directory(target) as folder:
            _link(source, files, folder)
    return f"{_FOLDER}{target.resolve()}"


def _chosen(source: Path, n_train: int) -> list[Path]:
    """The files of the smaller set, relative to the source."""
    if not (source / "train").is_dir():
        raise DataError(f"{source}: has no folder train/; expected train/CLASS/ and test/CLASS/ with images")
    classes = sorted(folder.name for folder in (source / "train").iterdir() if folder.is_dir())
    per_class = n_train // max(len(classes), 1)
    found: list[Path] = []
    for name in classes:
        images = sorted((source / "train" / name).iterdir())
        if len(images) < per_class:
            raise DataError(f"{source / 'train' / name}: has {len(images):,} images, {per_class:,} are needed")
        found += images[:per_class]
        if (source / "test" / name).is_dir():
            found += sorted((source / "test" / name).iterdir())
    return [file.relative_to(source) for file in found]


def _digest(source: Path, files: list[Path]) -> str:
    """Another one for other data: of another place, or changed since."""
    digest = hashlib.sha256(str(source).encode())
    for file in files:
        status = (source / file).stat()
        digest.update(f"{file.as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _link(source: Path, files: list[Path], folder: Path) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / file, folder / file)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / file, folder / file)
