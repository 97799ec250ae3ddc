"""Data: exact normalisation, seeded splits, folders of images, and a user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from pnanalysis.errors import DataError
from pnanalysis.inputs.data import LoaderSplit, Split, as_splits, fingerprint, load_data, resize


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of 6x5 images, 4 each to train on and 2 each to test on."""
    monkeypatch.setenv("PNANALYSIS_DATA", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def test_digits_are_split_by_seed_without_loss() -> None:
    data, again, other = (load_data("digits", split_seed=seed) for seed in (0, 0, 1))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1197, 300, 300]
    assert data.split_hash == again.split_hash != other.split_hash
    assert data.fingerprint == other.fingerprint
    both = torch.cat([data.validation.inputs, data.test.inputs])
    others = torch.cat([other.validation.inputs, other.test.inputs])
    assert torch.equal(both.sum((1, 2, 3)).sort().values, others.sum((1, 2, 3)).sort().values)


def test_training_images_are_normalised_to_mean_zero_and_variance_one() -> None:
    inputs, _ = load_data("digits", (3, 32, 32)).train.take(slice(None))
    assert inputs.shape == (1197, 3, 32, 32)
    # a mean of 3.7 million float32 numbers of order one: round-off of order 1e-6
    assert inputs.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert (inputs.double().std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_batches_hold_every_example_once_in_order() -> None:
    split = load_data("digits").test
    batches = list(split.batches(70))
    assert [len(targets) for _, targets in batches] == [70, 70, 70, 70, 20]
    assert torch.equal(torch.cat([targets for _, targets in batches]), split.targets)


def test_a_subset_is_drawn_by_seed_without_replacement() -> None:
    split = Split(torch.arange(50.0), torch.arange(50))
    assert torch.equal(split.subset(20, 1).targets, split.subset(20, 1).targets)
    assert len(split.subset(20, 1).targets.unique()) == 20
    assert not torch.equal(split.subset(20, 1).targets, split.subset(20, 2).targets)
    with pytest.raises(DataError, match="51 examples"):
        split.subset(51)


def test_a_folder_of_images_is_read_pixel_by_pixel(folder: Path) -> None:
    data = load_data(f"imagefolder:{folder}")
    assert data.classes == ("cat", "dog")
    assert data.train.targets.tolist() == [0] * 4 + [1] * 4
    pixels = np.asarray(Image.open(folder / "train/dog/2.png"))
    assert torch.equal(data.train.inputs[6].permute(1, 2, 0), torch.from_numpy(pixels.copy()))


def test_decoded_images_are_cached_until_a_file_changes(folder: Path) -> None:
    cache = Path(os.environ["PNANALYSIS_DATA"]) / "cache"
    first = load_data(f"imagefolder:{folder}")
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert load_data(f"imagefolder:{folder}").fingerprint == first.fingerprint
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(b"damaged")
    assert load_data(f"imagefolder:{folder}").fingerprint == first.fingerprint
    Image.fromarray(np.zeros((6, 5, 3), dtype=np.uint8)).save(folder / "train/cat/0.png")
    assert load_data(f"imagefolder:{folder}").fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 2


def test_images_are_brought_to_the_networks_size(folder: Path) -> None:
    assert load_data(f"imagefolder:{folder}", (1, 8, 8)).train.inputs.shape == (8, 1, 8, 8)


def _no_test(folder: Path) -> None:
    for file in (folder / "test").rglob("*.png"):
        file.unlink()


def _no_classes(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_classes, "no class folders"),
        (_no_test, "hold no images"),
        (lambda folder: (folder / "train/cat/0.png").write_bytes(b"no image"), "not a readable image"),
        (lambda folder: (folder / "test/cow").mkdir(), "train/ does not have"),
    ],
)
def test_a_bad_folder_gives_one_clear_error(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_data(f"imagefolder:{folder}")


@pytest.mark.parametrize("spec", ["imagefolder", "imagefolder:/no/such/folder", "mnist", "no_module:make"])
def test_a_data_set_that_is_not_there_is_an_error(spec: str) -> None:
    with pytest.raises(DataError):
        load_data(spec)


def test_resizing_keeps_constants_and_repeats_grey() -> None:
    grey = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(resize(grey, (3, 32, 32)), torch.full((2, 3, 32, 32), 77, dtype=torch.uint8))
    with pytest.raises(DataError, match="channels"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (1, 4, 4))


def test_what_users_have_becomes_splits() -> None:
    x, y = torch.randn(10, 3), torch.arange(10)
    assert as_splits((x, y)).fingerprint == as_splits({"train": TensorDataset(x, y)}).fingerprint == fingerprint(x, y)
    loader = as_splits(DataLoader(TensorDataset(x, y), batch_size=4)).train
    assert isinstance(loader, LoaderSplit)
    assert [len(targets) for _, targets in loader.subset(7).batches(99)] == [4, 4]
    assert loader.subset(11) == loader  # no more than there are


@pytest.mark.parametrize("data", [3, {"training": (torch.zeros(1), torch.zeros(1))}, (torch.zeros(3), torch.zeros(2))])
def test_what_is_no_data_is_refused(data: object) -> None:
    with pytest.raises(DataError):
        as_splits(data)


def test_nested_batches_are_counted_by_their_examples_and_keep_their_types() -> None:
    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    x = torch.arange(12.0).reshape(6, 2)
    loader = LoaderSplit([({"a": x}, Pair(x, x[:, 0])), ({"a": x}, Pair(x, x[:, 0]))])
    assert len(list(loader.subset(6).stream(1))) == 1
    inputs, targets = next(iter(loader.stream(1)))
    assert inputs.keys() == {"a"}
    assert isinstance(targets, Pair)


def test_arrays_are_tensors() -> None:
    x, y = np.ones((6, 2), np.float32), np.arange(6)
    assert as_splits((x, y)).train.targets.tolist() == list(range(6))
