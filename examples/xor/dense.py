"""Dense networks on the XOR problem, many initialisations side by side: what the figures repeat."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from examples.data import Split
from examples.results import Row
from examples.side_by_side import Member, Networks, fit, seeded
from examples.xor.problem import XORData
from examples.xor.training import OF_WEIGHTS

BATCH_SIZE, LR = 250, 1e-2


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), y)


def dense(
    *, k: int, p: int, n: int, hidden: int, data_seed: int, n_inits: int, epochs: int, weight_decay: float
) -> list[Row]:
    """Train one network of one hidden layer from several initialisations.

    Args:
        k: Dimensions of the XOR.
        p: Dimensions of the data.
        n: Training samples, and test samples.
        hidden: Hidden units.
        data_seed: Of the data.
        n_inits: How many initialisations.
        epochs: How long; the learning rate falls in the last third.
        weight_decay: Adam's.

    Returns:
        A row for each initialisation: ``loss``, the cross-entropy on the training set; ``gradient``, the norm of the
        gradient of what is minimised, which has the weight decay in it; and the AUC on the training and the test set in
        percent.
    """
    generator = torch.Generator().manual_seed(data_seed)
    train, test = XORData(k, p, n, generator), XORData(k, p, n, generator)
    first = OF_WEIGHTS + 1000 * data_seed
    inits = range(first, first + n_inits)
    members = [
        Member(
            seeded(seed, lambda: nn.Sequential(nn.Linear(p, hidden), nn.ReLU(), nn.Linear(hidden, 1))),
            Split(train.x, train.y),
            seed,
            LR,
            weight_decay,
        )
        for seed in inits
    ]
    fit(Networks(members, _loss, epochs, epochs // 3), BATCH_SIZE)
    return [{"init": member.seed, **_measures(member.net, train, test, weight_decay)} for member in members]


def _measures(net: nn.Module, train: XORData, test: XORData, weight_decay: float) -> Row:
    logits = net(train.x)
    loss = _loss(logits, train.y)
    parameters = list(net.parameters())
    gradient = [
        part + weight_decay * parameter.detach()
        for part, parameter in zip(torch.autograd.grad(loss, parameters), parameters, strict=True)
    ]
    with torch.no_grad():
        test_auc = binary_auroc(net(test.x).squeeze(-1), test.y.int())
    return {
        "loss": round(float(loss.detach()), 6),
        "gradient": round(float(torch.cat([part.flatten() for part in gradient]).norm()), 6),
        "train_auc": round(100 * float(binary_auroc(logits.detach().squeeze(-1), train.y.int())), 4),
        "test_auc": round(100 * float(test_auc), 4),
    }
