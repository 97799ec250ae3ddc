"""Smaller training sets, for networks that are too large for the machine: the first images of each class."""

from __future__ import annotations

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
    source, target = Path(data.removeprefix(_FOLDER)).expanduser().resolve(), work / "data" / f"train-{n_train}"
    if not target.is_dir():
        with atomic_directory(target) as folder:
            _copy(source, folder, n_train)
    return f"{_FOLDER}{target.resolve()}"


def _copy(source: Path, target: Path, n_train: int) -> None:
    if not (source / "train").is_dir():
        raise DataError(f"{source}: has no folder train/; expected train/CLASS/ and test/CLASS/ with images")
    classes = sorted(folder.name for folder in (source / "train").iterdir() if folder.is_dir())
    per_class = n_train // max(len(classes), 1)
    for name in classes:
        images = sorted((source / "train" / name).iterdir())
        if len(images) < per_class:
            raise DataError(f"{source / 'train' / name}: has {len(images):,} images, {per_class:,} are needed")
        _link(images[:per_class], target / "train" / name)
        if (source / "test" / name).is_dir():
            _link(sorted((source / "test" / name).iterdir()), target / "test" / name)


def _link(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, folder / file.name)
