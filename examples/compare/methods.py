"""The methods: what is searched for each, and how it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from lassonet import LassoNetClassifier
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import l1_min_c
from torch import Tensor, nn
from xgboost import XGBClassifier

from examples.data import Split

Settings = dict[str, Any]
FREE = 100.0  # chosen: so large that the intercept of a logistic regression is hardly penalised
PATH, WIDE_PATH = 1.1, 1.3  # chosen: with the default, 1.02, a fit to 10,000 features takes half an hour
WIDE = 3000  # features
PATH_START = 0.1  # all features are in use there; the default searches for it, up to 10,000 times


class Description(NamedTuple):
    """What a fitted method is made of.

    Attributes:
        importances: How much each feature matters to it, by the method's own measure, ``(features,)``; 0: it is not read.
        parameters: Numbers that it needs to predict: weights that are not zero, or nodes of trees.
    """

    importances: NDArray[np.floating[Any]]
    parameters: int


@dataclass
class Fitted:
    """A fitted method.

    Attributes:
        scores: From ``(n, features)`` to the classes' scores, ``(n, class)``: logits, where a method has them.
        describe: Tells what it is made of, which takes time that fitting does not.
        certified: Whether the features are certified, if that is asked.
    """

    scores: Callable[[Tensor], Tensor]
    describe: Callable[[], Description]
    certified: bool | None = None

    @cached_property
    def description(self) -> Description:
        """What it is made of."""
        return self.describe()

    @property
    def importances(self) -> NDArray[np.floating[Any]]:
        """How much each feature matters to it."""
        return self.description.importances

    @property
    def parameters(self) -> int:
        """How many numbers it needs to predict."""
        return self.description.parameters

    @property
    def features(self) -> list[int]:
        """The features that it reads."""
        return [int(place) for place in np.flatnonzero(self.importances > 0)]

    def top(self, n: int) -> list[int]:
        """Return the ``n`` features that matter most, or all that it reads if these are fewer."""
        first = np.argsort(-self.importances, kind="stable")[:n]
        return [int(place) for place in first if self.importances[place] > 0]


class Method(NamedTuple):
    """A method.

    Attributes:
        space: What is searched: values by name.
        fit: From settings, the training part, the number of classes and a seed.
        defaults: The first trial; None: one of the space.
    """

    space: dict[str, list[Any]]
    fit: Callable[[Settings, Split, int, int], Fitted]
    defaults: Settings | None = None


def logits(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what computes a network's logits, without gradients, in float64."""

    def scores(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(module(x)).double()

    return scores


def n_nonzero(module: nn.Module) -> int:
    """Count the weights that are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in module.parameters())


def _probabilities(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(np.asarray(model.predict_proba(x.numpy()), dtype=np.float64))


def _leaf(settings: Settings, train: Split) -> Settings:
    """Let no leaf need more than an eighth of the examples, or a small set could not be divided at all."""
    return settings | {"min_samples_leaf": max(1, min(settings["min_samples_leaf"], len(train.y) // 8))}


def logistic(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Fit a logistic regression with an L1 penalty, of several classes each against the others.

    The penalty is so many times weaker than the weakest with which all weights are zero, if the columns are centred.
    """
    x, y = train.x.numpy(), train.y.numpy()
    one = LogisticRegression(
        C=settings["times"] * l1_min_c(x, y, loss="log", fit_intercept=False), l1_ratio=1.0, solver="liblinear",
        max_iter=10_000, random_state=seed, intercept_scaling=FREE,
    )  # fmt: skip
    model = OneVsRestClassifier(one) if n_classes > 2 else one
    model.fit(x, y)

    def describe() -> Description:
        parts = model.estimators_ if n_classes > 2 else [one]
        weights = np.concatenate([part.coef_ for part in parts])
        return Description(np.abs(weights).max(axis=0), int((weights != 0).sum()) + len(parts))

    return Fitted(_probabilities(model), describe)


def forest(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Fit a random forest."""
    model = RandomForestClassifier(n_estimators=500, random_state=seed, **_leaf(settings, train))
    model.fit(train.x.numpy(), train.y.numpy())

    def describe() -> Description:
        return Description(model.feature_importances_, sum(tree.tree_.node_count for tree in model.estimators_))

    return Fitted(_probabilities(model), describe)


def histograms(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Fit scikit-learn's histogram-based gradient boosting."""
    model = HistGradientBoostingClassifier(random_state=seed, **_leaf(settings, train))
    model.fit(train.x.numpy(), train.y.numpy())

    def describe() -> Description:
        nodes = np.concatenate([tree.nodes for trees in model._predictors for tree in trees])
        inner = nodes[nodes["is_leaf"] == 0]
        gains = np.bincount(inner["feature_idx"], weights=inner["gain"], minlength=train.x.shape[1]).astype(np.float64)
        return Description(gains, len(nodes))

    return Fitted(_probabilities(model), describe)


def xgboost(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Fit XGBoost."""
    model = XGBClassifier(n_jobs=1, random_state=seed, tree_method="hist", importance_type="total_gain", **settings)
    model.fit(train.x.numpy(), train.y.numpy())

    def describe() -> Description:
        return Description(model.feature_importances_, len(model.get_booster().trees_to_dataframe()))

    return Fitted(_probabilities(model), describe)


def lassonet(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Fit LassoNet's path; of its networks the one that is best on a fifth of the training part is taken."""
    x, x_held, y, y_held = train_test_split(
        train.x.numpy(), train.y.numpy(), test_size=0.2, random_state=seed, stratify=train.y.numpy()
    )
    multiplier = WIDE_PATH if x.shape[1] > WIDE else PATH
    model = LassoNetClassifier(
        hidden_dims=(settings["hidden"],), M=settings["M"], path_multiplier=multiplier,
        lambda_start=PATH_START, random_state=seed, torch_seed=seed, verbose=0,
    )  # fmt: skip
    path = model.path(x, y, X_val=x_held, y_val=y_held, return_state_dicts=True)
    best = min(path, key=lambda step: (step.val_loss, int(step.selected.sum())))
    model.load(best.state_dict)

    def describe() -> Description:
        weights: Tensor = model.model.skip.weight.detach().norm(dim=0)  # the path takes features away by these
        return Description(weights.numpy(), n_nonzero(model.model))

    return Fitted(logits(model.model), describe)


OTHERS: dict[str, Method] = {
    "L1 logistic regression": Method({"times": [3.0, 10.0, 30.0, 100.0, 1000.0, 10_000.0]}, logistic),
    "random forest": Method(
        {"max_features": ["sqrt", 0.03, 0.05, 0.1, 0.2, 0.5], "min_samples_leaf": [1, 3, 10]}, forest
    ),
    "HistGradientBoosting": Method(
        {
            "learning_rate": [0.03, 0.1, 0.3],
            "max_iter": [100, 300, 1000],
            "min_samples_leaf": [5, 20],
            "max_leaf_nodes": [15, 31, 63],
            "l2_regularization": [0.0, 1.0],
            "max_features": [0.5, 1.0],
        },
        histograms,
        {
            "learning_rate": 0.1,
            "max_iter": 100,
            "min_samples_leaf": 20,
            "max_leaf_nodes": 31,
            "l2_regularization": 0.0,
            "max_features": 1.0,
        },
    ),
    "XGBoost": Method(
        {
            "learning_rate": [0.03, 0.1, 0.3],
            "n_estimators": [100, 300, 1000],
            "max_depth": [3, 6, 9],
            "subsample": [0.7, 1.0],
            "colsample_bytree": [0.5, 1.0],
        },
        xgboost,
        {"learning_rate": 0.3, "n_estimators": 100, "max_depth": 6, "subsample": 1.0, "colsample_bytree": 1.0},
    ),
    "LassoNet": Method({"hidden": [50, 100], "M": [0.3, 1.0, 3.0, 10.0, 100.0, 1000.0]}, lassonet),
}
