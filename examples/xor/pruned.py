"""One run of a method of Table 1 on the XOR problem: what the figures repeat."""

from __future__ import annotations

from examples.results import Row
from examples.xor.training import Job, train


def pruned(*, k: int, p: int, n: int, hidden: int, method: str, data_seed: int) -> Row:
    """Train a network by a method's recipe; return its AUC on the training and the test set in percent.

    Args:
        k: Dimensions of the XOR.
        p: Dimensions of the data.
        n: Training samples, and test samples.
        hidden: Hidden units.
        method: As `examples.xor.recipes` has it.
        data_seed: Of data, initialisation and batches.
    """
    run = train(Job(k, p, n, hidden, method, data_seed))
    return {
        "train_auc": round(run.train_auc, 4),
        "test_auc": round(run.test_auc, 4),
        "tries": run.tries,
        "live_features": run.live_features,
        "connections": sum(run.connections.values()),
    }
