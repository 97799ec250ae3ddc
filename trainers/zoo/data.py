"""The registered data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pnanalysis.checks import human
from pnanalysis.errors import DataError, PnError, reason
from pnanalysis.inputs.data import RawImages, data_directory, may_download
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import read_regular
from pnanalysis.spectra.free_memory import free_bytes
from trainers.zoo.kink import kink_data

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_MOST_BYTES = 256 * 2**20  # of an image file; Pillow bounds its pixels
_MOST_16_BITS = 65_535
_DIGITS_TRAIN = 1197  # of 1,797; the other 600 become validation and test


def digits(path: str | None = None, input_shape: tuple[int, ...] | None = None) -> RawImages:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey levels 0 to 16 (Alpaydin and Kaynak 1998, UCI).

    1,197 images for training and 600 for validation and test, in a fixed random order.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    classes = tuple(str(digit) for digit in range(10))
    return RawImages(images[train], targets[train], images[test], targets[test], classes)


def cifar10(path: str | None = None, input_shape: tuple[int, ...] | None = None) -> RawImages:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, which checks its MD5 sums.

    A training downloads it; an analysis does not.

    Parameters
    ----------
    path : str, optional
        Folder for the download; by default the data directory.

    Raises
    ------
    DataError
        If it is not found and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    root = path or data_directory()
    try:
        train, test = (CIFAR10(str(root), train=train, download=may_download()) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if not may_download():
            raise DataError(
                f"CIFAR-10 is not in {root}, and analyses download nothing; point PNANALYSIS_DATA to the folder that "
                "the training used, or give --data cifar10:FOLDER"
            ) from error
        raise DataError(
            f"CIFAR-10 is not in {root} and cannot be downloaded ({error}); "
            "put cifar-10-batches-py there, or use imagefolder:PATH with a folder of images"
        ) from error

    def images(dataset: CIFAR10) -> Tensor:
        return torch.from_numpy(np.asarray(dataset.data)).permute(0, 3, 1, 2).contiguous()

    return RawImages(
        images(train), torch.tensor(train.targets), images(test), torch.tensor(test.targets), tuple(train.classes)
    )


def imagefolder(path: str | None = None, input_shape: tuple[int, ...] | None = None) -> RawImages:
    """Images in ``PATH/train/CLASS/`` and ``PATH/test/CLASS/``, decoded once and cached.

    The cache, a safetensors file in the data directory, is keyed by the names and contents of all image files and by
    the size they are resized to; it is rebuilt when any of them changes.

    Parameters
    ----------
    path : str
        The folder.
    input_shape : tuple, optional
        ``(C, H, W)``; without it three channels, and the size of the first image. Others are resized to it.

    Raises
    ------
    DataError
        If the folder is missing, has no class folders, no images, or an image is unreadable or not of integers up to
        65,535.
    """
    if not path:
        raise DataError("no folder given; write imagefolder:PATH, with images in PATH/train/CLASS and PATH/test/CLASS")
    root = Path(path).expanduser()
    classes = _class_names(root)
    files = {split: list(_images(root / split, classes)) for split in ("train", "test")}
    shape = input_shape or _shape_of(files["train"][0][0])
    cache = data_directory() / "cache" / f"images-{_content_key(root, files, shape)}.safetensors"
    tensors = _read_cache(cache)
    if tensors is None:
        tensors = {}
        for split, entries in files.items():
            tensors[f"{split}_inputs"] = _decode([file for file, _ in entries], shape)
            tensors[f"{split}_targets"] = torch.tensor([label for _, label in entries])
        try:
            with atomic_path(cache) as temporary:
                save_file(tensors, temporary)
        except OSError as error:
            raise DataError(
                f"{cache}: cannot be written ({error.strerror}); point PNANALYSIS_DATA elsewhere"
            ) from error
    return RawImages(**tensors, classes=tuple(classes))


def kink6(path: str | None = None, input_shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """The six points of the kink regression, inputs and targets of shape (6, 1); see :mod:`trainers.zoo.kink`."""
    return _kink("kink6")


def kink20(path: str | None = None, input_shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """The kink regression with twenty points, shape (20, 1)."""
    return _kink("kink20")


def _kink(name: str) -> tuple[Tensor, Tensor]:
    x, y = kink_data(name)
    return torch.tensor(x, dtype=torch.float32)[:, None], torch.tensor(y, dtype=torch.float32)[:, None]


def _class_names(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(f"{root}: has no folder {split}/; expected train/CLASS/ and test/CLASS/ with images")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    if not classes:
        raise DataError(f"{root / 'train'}: has no class folders; put each class's images in a folder of its name")
    unknown = sorted({folder.name for folder in (root / "test").iterdir() if folder.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{root / 'test' / unknown[0]}: train/ does not have this class; add it or remove it here")
    return classes


def _images(folder: Path, classes: list[str]) -> Iterator[tuple[Path, int]]:
    found = False
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
            if Path(entry.name).suffix.lower() in _IMAGE_SUFFIXES:
                found = True
                yield Path(entry.path), label
    if not found:
        raise DataError(f"{folder}: its class folders hold no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")


def _content_key(root: Path, files: dict[str, list[tuple[Path, int]]], shape: tuple[int, ...]) -> str:
    digest = hashlib.blake2b(f"v2 {tuple(shape)}".encode(), digest_size=10)
    for entries in files.values():
        for file, label in entries:
            digest.update(f"\0{file.relative_to(root)}\0{label}\0".encode())
            digest.update(_bytes(file))
    return digest.hexdigest()


def _read_cache(cache: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(cache) if cache.is_file() else None
    except SafetensorError:  # a damaged file: decode the images again
        return None


def _shape_of(file: Path) -> tuple[int, int, int]:
    width, height = _open(file).size
    return 3, height, width


def _decode(files: list[Path], shape: tuple[int, ...]) -> Tensor:
    """uint8 tensor (N, C, H, W)."""
    channels, height, width = shape
    size = len(files) * channels * height * width
    if size > (free := free_bytes(torch.device("cpu"))):
        raise DataError(
            f"{len(files):,} images of {channels} x {height} x {width} take {human(size)}, and {human(free)} are free; "
            "name a network that takes smaller images, or leave some out"
        )
    images = np.empty((len(files), height, width, channels), dtype=np.uint8)

    def decode(i: int) -> None:
        image = _eight_bits(_open(files[i]), files[i]).convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        images[i] = np.asarray(image).reshape(height, width, channels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(files)), chunksize=512):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    """Grey levels of 16 bits as levels of 8, which Pillow would clip at 255 instead."""
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _MOST_16_BITS:
        raise DataError(f"{file}: has pixels that are not integers of 8 or 16 bits; save it with levels of 8 bits")
    return Image.fromarray(np.rint(levels * (255 / _MOST_16_BITS)).astype(np.uint8))


def _open(file: Path) -> Image.Image:
    try:
        image = Image.open(BytesIO(_bytes(file)))
        image.load()
    except PnError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many types on damaged and on huge pictures
        raise DataError(f"{file}: not a readable image ({reason(error)}); repair or remove it") from error
    return image


def _bytes(file: Path) -> bytes:
    return read_regular(file, _MOST_BYTES, DataError)
