"""swl.torch inside trainers that other people wrote: the same losses as with torch's own layers."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import swl.torch

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own things

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
T = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def network(ours: bool) -> Any:
    torch.manual_seed(0)
    affine = swl.torch.Affine if ours else torch.nn.Linear
    return torch.nn.Sequential(affine(5, 8), torch.nn.Tanh(), affine(8, 3))


@pytest.mark.parametrize("how", ["modules", "patch"])
def test_lightning(how: str, tmp_path: Path) -> None:
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self, ours: bool) -> None:
            super().__init__()
            self.net = network(ours)
            self.loss = (swl.torch if ours else torch.nn).CrossEntropyLoss(label_smoothing=0.1)
            self.seen: list[float] = []

        def training_step(self, rows: Any, index: int) -> Any:
            loss = self.loss(self.net(rows[0]), rows[1])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    def losses(ours: bool) -> list[float]:
        model = Net(ours)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2,
        )  # fmt: skip
        rows = torch.utils.data.TensorDataset(X, T)
        trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=16))
        return model.seen

    want = losses(ours=False)
    assert want[-1] < want[0]
    if how == "modules":
        assert losses(ours=True) == pytest.approx(want, rel=1e-6, abs=1e-6)
        return
    with swl.torch.patch() as report:
        assert losses(ours=False) == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert (report.covered, report.fell_through.total()) == (12, 0)


def test_skorch() -> None:
    import skorch

    def fitted(ours: bool) -> Any:
        loss = (swl.torch if ours else torch.nn).CrossEntropyLoss
        net = skorch.NeuralNetClassifier(
            network, module__ours=ours, criterion=loss, criterion__label_smoothing=0.1, max_epochs=5, lr=0.5,
            train_split=None, verbose=0, optimizer=torch.optim.SGD,
        )  # fmt: skip
        return net.fit(X.numpy(), T.numpy())

    ours, plain = fitted(ours=True), fitted(ours=False)
    np.testing.assert_allclose(ours.history[:, "train_loss"], plain.history[:, "train_loss"], rtol=1e-5)
    np.testing.assert_allclose(ours.predict_proba(X.numpy()), plain.predict_proba(X.numpy()), rtol=1e-4)


DDP = """
import sys
import torch
import swl.torch
from test_torch_clients import T, X, network

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
torch.set_num_threads(1)
rank = torch.distributed.get_rank()
losses = []
for ours in (False, True):
    net = torch.nn.parallel.DistributedDataParallel(network(ours))
    head = (swl.torch if ours else torch.nn).LinearCrossEntropyLoss(3, 4)
    torch.nn.init.constant_(head.linear.weight, 0.1)
    loss = (swl.torch if ours else torch.nn).CrossEntropyLoss()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    seen = []
    for _ in range(5):
        y = net(X[rank::2])
        value = loss(y, T[rank::2]) + head(y, T[rank::2])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        seen.append(value.detach())
    losses.append(torch.stack([*seen, *(p.detach().sum() for p in net.parameters())]))
torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
torch.distributed.destroy_process_group()
print("the same")
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", DDP, str(tmp_path / "meeting")]
    start = functools.partial(
        subprocess.Popen, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ranks = [start([*command, str(rank)]) for rank in range(2)]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert out == "the same\n", err
