"""Models by name, weights into models, and runs that must not be trusted with code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pnanalysis.errors import ModelError, PnError
from pnanalysis.inputs.loading import load_weights
from pnanalysis.inputs.models import build_model, parameter_layers, resolve_loss
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import as_source, resolve_device
from pnanalysis.io.runs import Run, open_run
from pnanalysis.io.writer import RunWriter

PARAMETERS = {"lenet5": 62_006, "alexnet": 28_711_754, "resnet18": 11_173_962, "tanh7": 1_118_218, "relu32": 1_153}


@pytest.mark.parametrize("name", PARAMETERS)
def test_registered_models_run_and_have_the_documented_size(name: str) -> None:
    model = build_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model(torch.zeros(2, *model.input_shape)).shape == (2, 1 if name == "relu32" else 10)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="lenet5.*module:factory"):
        build_model("lenet6")


def test_a_factory_of_ones_own_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_model("my_nets:make"), nn.Linear)


@pytest.mark.parametrize("spec", ["no_such_module:make", "torch:no_such_thing", "math:pi"])
def test_a_factory_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(ModelError):
        build_model(spec)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "lacks 'bias'"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "has shape"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "holds 'more'"),
    ],
)
def test_weights_of_another_architecture_are_refused(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_weights(nn.Linear(3, 2), state)


def test_layers_are_the_modules_that_own_parameters() -> None:
    layers = dict(parameter_layers(build_model("resnet18")))
    assert {"conv1", "bn1", "fc", "layer2.0.downsample.0"} <= layers.keys()
    assert [name for name, _ in layers["bn1"]] == ["bn1.weight", "bn1.bias"]
    assert sum(p.numel() for own in layers.values() for _, p in own) == PARAMETERS["resnet18"]


def test_a_narrow_resnet18_has_the_same_layers() -> None:
    narrow, network = build_model("resnet18", {"width": 8}), build_model("resnet18")
    shapes, own = (dict(net.state_dict()) for net in (network, narrow))
    assert list(own) == list(shapes)
    assert own["bn1.weight"].shape == (8,)
    assert own["layer4.1.conv2.weight"].shape == (64, 64, 3, 3)
    assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert build_model("resnet18", {"width": 64}).state_dict().keys() == shapes.keys()


def test_a_narrow_alexnet_has_the_same_layers() -> None:
    narrow, network = build_model("alexnet", {"width": 8}), build_model("alexnet")
    shapes, own = ({key: tuple(v.shape) for key, v in net.state_dict().items()} for net in (network, narrow))
    assert list(own) == list(shapes)
    assert own["features.0.weight"] == (8, 3, 3, 3)
    assert own["features.10.weight"] == (32, 32, 3, 3)
    assert own["classifier.1.weight"] == (512, 32 * 9)
    assert own["classifier.6.weight"] == (10, 512)
    assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == {key: tuple(v.shape) for key, v in build_model("alexnet", {"width": 64}).state_dict().items()}


def test_losses_by_name_and_unknown_ones() -> None:
    assert resolve_loss("mse") is nn.functional.mse_loss
    with pytest.raises(ModelError, match="cross_entropy"):
        resolve_loss("hinge")


def test_a_run_that_names_code_is_not_believed(tiny_run: Run, tmp_path: Path) -> None:
    manifest = {**tiny_run.manifest, "model": {"name": "os:system", "options": {}}}
    RunWriter.create(tmp_path / "evil", manifest)
    with pytest.raises(PnError, match="to run that code, give it again"):
        as_source(open_run(tmp_path / "evil"))


def test_a_run_on_code_as_data_needs_the_users_word(tiny_run: Run, tmp_path: Path) -> None:
    manifest = {**tiny_run.manifest, "data": {"name": "my_data:make"}}
    RunWriter.create(tmp_path / "evil", manifest)
    with pytest.raises(PnError, match="--data"):
        _ = as_source(open_run(tmp_path / "evil")).data


def test_changed_data_are_noticed(tiny_run: Run, tmp_path: Path) -> None:
    data = {**tiny_run.manifest["data"], "fingerprint": "0" * 16}
    RunWriter.create(tmp_path / "changed", {**tiny_run.manifest, "data": data})
    with pytest.raises(PnError, match="has changed"):
        _ = as_source(open_run(tmp_path / "changed")).data


def test_files_of_ones_own_get_short_distinct_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(nn.Linear(3, 2).state_dict(), tmp_path / folder / "end.safetensors")
    source = open_files(nn.Linear(3, 2), sorted(tmp_path.glob("*/end.safetensors")))
    assert list(source.select(None)) == ["a/end", "b/end"]
    with pytest.raises(ModelError, match="no weights named"):
        source.select(["c/end"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if torch.cuda.is_available() and device != "gpu":
        pytest.skip("has CUDA")
    with pytest.raises(ModelError):
        resolve_device(device)


def test_weights_of_wrapped_and_tied_networks_fit() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in other.state_dict().items() if name != "1.weight"}
    load_weights(net, state)
    torch.testing.assert_close(net(torch.ones(1, 3)), other(torch.ones(1, 3)))
    with pytest.raises(ModelError, match=r"holds 'extra'"):
        load_weights(net, {**other.state_dict(), "extra": torch.ones(1)})


def test_weights_that_are_not_finite_are_named() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"w.pt: 'bias' holds values that are not finite"):
        load_weights(net, {"weight": torch.ones(2, 2), "bias": torch.tensor([1.0, torch.nan])}, "w.pt")
