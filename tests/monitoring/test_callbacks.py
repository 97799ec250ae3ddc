"""The monitor as a callback: the same numbers as in a plain loop, and the same training as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FEW: dict[str, Any] = {"expected_products": 10, "trace_probes": 2}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 3, generator=generator), torch.randint(2, (48,), generator=generator)


@pytest.mark.parametrize("inner", [False, True])
def test_lightning(inner: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from pnanalysis.monitoring.lightning import CurvatureCallback

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    modules = []
    callback = CurvatureCallback(data(), every=2, network=(lambda m: m.network) if inner else None, **FEW)
    for callbacks in ([], [callback]):
        module = Classifier()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True))
        modules.append(module)
    for mine, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(mine, other)
    ds = callback.dataset()
    assert ds.step.values.tolist() == [0, 2, 4, 6]
    assert ds.attrs["optimizer"] == "Adam"
    assert np.isfinite(ds.preconditioned_lambda_max[1:]).all()
    with torch.no_grad():
        loss = F.cross_entropy(modules[1].eval()(data()[0]), data()[1])
    assert float(ds.loss[-1]) == pytest.approx(float(loss), rel=1e-5)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pnanalysis.monitoring.hugging_face import CurvatureCallback

    tokens = torch.randint(5, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[0] % 2} for t in tokens]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], save_strategy="no", seed=0,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback, models = CurvatureCallback([batch], every=2, **FEW), []
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=8,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        transformers.Trainer(model, settings, train_dataset=examples, callbacks=callbacks).train()
        models.append(model)
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, other)
    ds = callback.dataset()
    assert ds.step.values.tolist() == [0, 2, 4]
    assert ds.attrs["optimizer"] == "AdamW"
    assert np.isfinite(ds.preconditioned_lambda_max[1:]).all()
    with torch.no_grad():
        assert float(ds.loss[-1]) == pytest.approx(float(models[1].eval()(**batch).loss), rel=1e-5)


def test_transformers_resumes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import pnanalysis as pn
    from pnanalysis.monitoring.hugging_face import CurvatureCallback

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("stopped")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.layer(x)
            return transformers.modeling_outputs.SequenceClassifierOutput(F.cross_entropy(logits, labels), logits)

    x, y = data()
    examples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to=[], save_steps=2, seed=0, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    path = tmp_path / "curvature.nc"

    def trainer(*more: Any) -> Any:
        callback = CurvatureCallback([{"x": x, "labels": y}], every=1, path=path, **FEW)
        return transformers.Trainer(Network(), settings, train_dataset=examples, callbacks=[callback, *more])

    first = trainer(Stop)
    with pytest.raises(RuntimeError, match="stopped"):
        first.train()
    inner = getattr(first.optimizer, "optimizer", first.optimizer)
    assert not inner._optimizer_step_post_hooks
    assert not inner._optimizer_step_pre_hooks
    before = pn.load(path)
    assert before.step.values.tolist() == [0, 1, 2, 3]
    trainer().train(resume_from_checkpoint=True)
    after = pn.load(path)
    assert after.step.values.tolist() == list(range(7))
    np.testing.assert_array_equal(after.lambda_max[:3], before.lambda_max[:3])


def test_lightning_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    import pnanalysis as pn
    from pnanalysis.monitoring.lightning import CurvatureCallback

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Linear(3, 2)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    path, saved = tmp_path / "curvature.nc", None
    for epochs in (1, 2):
        callback = CurvatureCallback(data(), every=1, path=path, network=lambda module: module.network, **FEW)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Classifier(), DataLoader(TensorDataset(*data()), batch_size=16), ckpt_path=saved)
        saved = tmp_path / "model.ckpt"
        trainer.save_checkpoint(saved)
    assert pn.load(path).step.values.tolist() == list(range(7))
