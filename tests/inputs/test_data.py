"""Data: exact normalisation, seeded splits, folders of images, and a user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pnanalysis.errors import DataError
from pnanalysis.inputs.batches import fingerprint, tensors
from pnanalysis.inputs.data import LoaderSplit, Split, as_splits, load_data, resize


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


def test_grey_levels_of_16_bits_are_scaled_to_8(folder: Path) -> None:
    """Pillow itself clips them, which leaves black and white."""
    levels = np.arange(30, dtype=np.uint16).reshape(6, 5) * 8
    Image.fromarray(levels * 257).save(folder / "train/cat/0.png")
    Image.fromarray(levels.astype(np.uint8)).save(folder / "train/cat/1.png")
    for shape in ((1, 6, 5), (3, 6, 5)):
        deep, plain = load_data(f"imagefolder:{folder}", shape).train.inputs[:2]
        assert torch.equal(deep, plain)
        assert torch.equal(deep[0], torch.from_numpy(levels.astype(np.uint8)))


def _no_test(folder: Path) -> None:
    for file in (folder / "test").rglob("*.png"):
        file.unlink()


def _no_classes(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def _huge_picture(folder: Path) -> None:
    """A file of a few bytes, whose header claims 50,000 x 50,000 pixels."""
    (folder / "train/cat/0.ppm").write_bytes(b"P6\n50000 50000\n255\n" + bytes(100))


def _real_numbers(folder: Path) -> None:
    """A picture of floating-point numbers, which Pillow tells by its content whatever its name."""
    Image.fromarray(np.zeros((6, 5), dtype=np.float32)).save(folder / "train/cat/0.png", format="TIFF")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_images_are_read_or_are_one_clear_error(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for suffix in ("png", "jpg", "bmp", "webp", "ppm"):
        picture = folder / f"train/cat/0.{suffix}"
        Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(picture)
        raw = np.frombuffer(picture.read_bytes(), np.uint8)
        for _ in range(20):
            bad = raw.copy()
            bad[generator.integers(0, len(bad), 3)] = generator.integers(0, 256, 3)
            picture.write_bytes(bad[: generator.integers(1, len(bad) + 1)].tobytes())
            try:
                assert load_data(f"imagefolder:{folder}", (3, 6, 5)).train.inputs.shape[1:] == (3, 6, 5)
            except DataError as error:
                assert str(picture) in str(error)  # noqa: PT017
        picture.unlink()


def test_images_that_would_not_fit_in_memory_are_refused_before_any_is_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"8 images of 3 x 1000000 x 1000000 take .*GiB"):
        load_data(f"imagefolder:{folder}", (3, 10**6, 10**6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_classes, "no class folders"),
        (_no_test, "hold no images"),
        (lambda folder: (folder / "train/cat/0.png").write_bytes(b"no image"), "not a readable image"),
        (lambda folder: (folder / "test/cow").mkdir(), "train/ does not have"),
        (lambda folder: os.mkfifo(folder / "train/cat/9.png"), "not a regular file"),
        (lambda folder: (folder / "train/cat/9.png").symlink_to("/dev/zero"), "not a regular file"),
        (lambda folder: (folder / "train/cat/9.png").mkdir(), "not a regular file"),
        (lambda folder: os.truncate(folder / "train/cat/0.png", 2**40), "bytes"),
        (_huge_picture, "2500000000 pixels"),
        (_real_numbers, "not integers of 8 or 16 bits"),
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
    assert len(loader.subset(11).batches(99)) == 3  # no more than there are


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


X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20)


class Rows(Dataset):
    """Examples in a form of one's own; counts how many are read."""

    def __init__(self, form=lambda x, y: (x, y), size: int = 20) -> None:
        self.form, self.size, self.n_read = form, size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int):
        self.n_read += 1
        return self.form(X[i % 20], int(Y[i % 20]))


class Stream(IterableDataset):
    """The same, of unknown length."""

    def __iter__(self):
        return zip(X, Y, strict=True)


@pytest.mark.parametrize(
    "data",
    [
        Rows(),
        Rows(lambda x, y: {"x": x, "label": y}),
        Rows(lambda x, y: (x.numpy(), np.int64(y))),
        Stream(),
        DataLoader(Stream(), batch_size=7),
        ((X, X), Y),
        ({"x": X.numpy()}, Y),
        {"x": X, "labels": Y},
        (X, X, Y),
        [(X[:9], Y[:9]), (X[9:], Y[9:])],
        ({"x": X[:9], "y": Y[:9]}, {"x": X[9:], "y": Y[9:]}),
        [(X[:9].numpy(), Y[:9].numpy()), (X[9:].numpy(), Y[9:].numpy())],
    ],
)
def test_every_form_of_data_gives_the_same_examples(data: object) -> None:
    found = list(as_splits(data).examples("train", None, 0, "cpu").batches(6))
    assert torch.equal(torch.cat([targets for _, targets in found]), Y)
    leading = [next(tensors(inputs)) for inputs, _ in found]
    assert torch.equal(torch.cat(leading), X)


def test_only_the_examples_asked_for_are_read() -> None:
    large = Rows(size=10**6)
    part = as_splits(large).examples("train", 70, 3, "cpu")
    assert len(part) == large.n_read == 70
    again = as_splits(Rows(size=10**6)).examples("train", 70, 3, "cpu")
    assert torch.equal(part.inputs, again.inputs)
    assert len(as_splits(Stream()).examples("train", 5, 0, "cpu")) == 5
    assert len(as_splits(Rows()).in_memory().train) == 20


def _broken(x: torch.Tensor, y: int) -> object:
    raise KeyError("no such image")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X.log(), Y), r"train, example 0: .*not finite"),
        ((X, X.masked_fill(X == 5, torch.nan)), r"train, example 2: .*not finite"),
        ([(X, Y), (X, X / 0)], r"train, batch 1: .*not finite"),
        ((X[:0], Y[:0]), "train: there are no examples"),
        ([], "train: the loader gives no batches"),
        ([(X, Y), (X[:0], Y[:0])], "batch 1: it is empty"),
        (Rows(size=0), "train: the loader gives no batches"),
        ([X, Y, X[0]], "20 inputs but 2 targets"),
        ([X], "a Tensor is not a batch of inputs and targets"),
        ([{"x": X}], "a mapping of x has no targets"),
        ([(X, Y, "names")], "a tuple of 3 is not a batch"),
        (iter([(X, Y)]), "an iterator is used up after one pass"),
        ((np.array([{}] * 3), np.ones(3)), "an array of object cannot become a tensor"),
        (Rows(_broken), r"batch 0 cannot be read \(KeyError: 'no such image'\)"),
        (Rows(lambda x, y: (x[: 1 + y % 2], y)), "cannot be stacked .*collate_fn"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_sentence(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        as_splits(data).examples("train", None, 0, "cpu").batches(4)
    assert "\n" not in str(caught.value)


def test_masks_of_minus_infinity_are_taken() -> None:
    mask = torch.zeros(20, 2).masked_fill(X > 7, -torch.inf)
    assert len(as_splits(((X, mask), Y)).examples("train", None, 0, "cpu")) == 20


def test_numbers_take_the_precision_of_the_analysis_and_integers_stay() -> None:
    for data in (
        ({"x": X.double(), "z": X.to(torch.complex128), "i": Y}, X.double().numpy()),
        Rows(lambda x, y: (x, 0.5)),
    ):
        inputs, targets = next(iter(as_splits(data).examples("train", None, 0, "cpu", torch.float32).batches(4)))
        assert targets.dtype == torch.float32
        if isinstance(inputs, dict):
            assert [t.dtype for t in inputs.values()] == [torch.float32, torch.complex64, torch.int64]


def test_normalising_leaves_the_examples_alone() -> None:
    split = Split(X.clone(), Y, torch.ones(2), torch.ones(2))
    assert torch.equal(split.take(slice(None))[0], X - 1)
    assert torch.equal(split.inputs, X)
