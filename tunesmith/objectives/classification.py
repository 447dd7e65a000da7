"""Classification: one class of a text, several, or a place in a hierarchy of classes.

    one:      loss = sum_s -u_s log p(y_s | x_s) / sum_s u_s,       p = softmax(z)                        (u: class weights)
    several:  loss = sum_s (1/K) sum_k -log p(y_sk | x_s) / S,      p_k = sigmoid(z_k)
    levels:   loss = sum_s u_s (1/L) sum_l -log sum_{k below a_l(y_s)} p(k | x_s) / sum_s u_s

The last is the hierarchical cross-entropy of Bertinetto et al. 2020 (section 3.1) with the same weight on every level.
Probabilities are sharpened or flattened by one temperature, fitted on the validation rows (Guo et al. 2017, section 4.2).
Where a share of right answers is asked for, the model answers only above the probability at which it reaches that share on
the validation rows, and says that it does not know below.

Shapes: B rows, S sequences, K classes, M ancestors of one level.
"""

from collections import Counter
from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from scipy.optimize import minimize_scalar
from torch import Tensor

from tunesmith.data.answers import Classes, Floats
from tunesmith.data.pack import Pack
from tunesmith.data.types import Example
from tunesmith.errors import DataError, RecipeError
from tunesmith.objectives.base import Loss, Readout, row_error
from tunesmith.objectives.headed import Calibration, Headed, known, label_of

NONE = -1.0  # the value of a row with no class at all
TEMPERATURES = (0.05, 20.0)


class Classification(Headed):
    """A class of a text, or several."""

    kind: Literal["classification"] = "classification"
    summary: ClassVar[str] = "a class of a text, several, or a place in a hierarchy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "log_loss", "calibration_error")
    baselines: ClassVar[tuple[str, ...]] = ("majority",)

    labels: tuple[str, ...] | None = Field(default=None, description="the classes; by default all that the rows have")
    several: bool | None = Field(
        default=None, description="whether a row may have several classes; by default whether labels are lists"
    )
    hierarchy: str | None = Field(
        default=None, min_length=1, description="what stands between the levels of a class, such as / in billing/refund"
    )
    class_weights: Literal["equal", "balanced"] | dict[str, float] = Field(
        default="equal", description="how much a row of a class counts; balanced: each class counts alike"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    right_share: float | None = Field(
        default=None, gt=0, lt=1, description="answer only where so many answers are right on the validation rows"
    )

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        for name in self.idle:
            if getattr(self, name) not in (type(self).model_fields[name].default, False):
                raise ValueError(f"{name} has no effect on {self.kind}; it belongs to objective: classification")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names a class twice")
        if self.several:
            for name in ("hierarchy", "right_share"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect where a row has several classes")
            if self.class_weights != "equal" or self.label_smoothing:
                raise ValueError("class_weights and label_smoothing have no effect where a row has several classes")
        if self.hierarchy is not None and self.label_smoothing:
            raise ValueError("label_smoothing has no effect beside a hierarchy")
        if isinstance(self.class_weights, dict):
            if any(weight <= 0 for weight in self.class_weights.values()):
                raise ValueError("class_weights must be above zero")
            if unknown := sorted(set(self.class_weights) - set(self.labels or self.class_weights)):
                raise ValueError(f"class_weights names {unknown[0]!r}, which is no class")
        return self

    @property
    def num_outputs(self) -> int:
        """One a class."""
        return len(self.labels or ())

    def fitted(self, examples: Iterable[tuple[Example, bool]]) -> Self:
        """Classes, whether there may be several, and balanced weights: n / (K n_k), of the training rows."""
        if self.labels is not None and self.several is not None and self.class_weights != "balanced":
            return self
        counts: Counter[str] = Counter()
        several = bool(self.several)
        defect: DataError | None = None
        for example, trained in examples:
            try:
                label = label_of(example)
            except DataError as error:  # such a row is refused, or dropped, where it is rendered
                defect = defect or error
                continue
            several = several or (isinstance(label, tuple) and self.several is None)
            for name in label if isinstance(label, tuple) else (label,):
                counts[name] += trained
        labels = self.labels or tuple(sorted(counts))
        if not labels and defect is not None:
            raise defect
        if len(labels) < 2:
            raise DataError(f"there are {len(labels)} classes in the rows", hint="a classification needs two at least")
        update: dict[str, object] = {"labels": labels, "several": several}
        if self.class_weights == "balanced":
            total = sum(counts.values())
            update["class_weights"] = {k: total / (len(labels) * counts[k]) for k in labels if counts[k]}
        try:
            return type(self).model_validate(self.model_dump() | update)
        except ValidationError as error:
            complaint = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(f"objective: {complaint}", hint="change the setting, or the labels of the rows") from None

    def values(self, example: Example) -> list[float]:
        """Numbers of the row's classes."""
        assert self.labels is not None, "fitted fills them in"
        label = label_of(example)
        names = label if isinstance(label, tuple) else (label,)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise row_error(
                example, f"the class {unknown[0]!r} is none of objective.labels", hint="add it, or mend the row"
            )
        if not self.several and len(names) != 1:
            raise row_error(
                example, f"the row has {len(names)} classes and one is expected", hint="set objective.several: true"
            )
        return [float(self.labels.index(name)) for name in names] or [NONE]

    def row_weight(self, values: np.ndarray) -> float:
        """The weight of the row's class."""
        if not isinstance(self.class_weights, dict):
            return 1.0
        assert self.labels is not None
        return self.class_weights.get(self.labels[int(values[0])], 1.0)

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Cross-entropy; with `accuracy` as a metric."""
        output_SK, _ = self.by_row(readout, pack)
        values = known(pack)
        if self.several:
            truth_SK = torch.from_numpy(self._truth(values)).to(output_SK)
            each_S = torch.nn.functional.binary_cross_entropy_with_logits(output_SK, truth_SK, reduction="none").mean(
                -1
            )
            right = float(((output_SK.detach() > 0) == (truth_SK > 0)).all(-1).sum())
            return Loss(each_S.sum(), self.count(pack), {"accuracy": (right, float(len(values)))})
        class_S = torch.tensor([int(v[0]) for v in values], device=output_SK.device)
        weight_S = output_SK.new_tensor([self.row_weight(v) for v in values])
        each_S = self._levels(output_SK.log_softmax(-1), class_S)
        right = float((output_SK.detach().argmax(-1) == class_S).sum())
        return Loss((weight_S * each_S).sum(), self.count(pack), {"accuracy": (right, float(len(values)))})

    def _levels(self, logprob_SK: Tensor, class_S: Tensor) -> Tensor:
        """-log p of the class, smoothed, or a mean of it over the levels of the hierarchy."""
        levels = self.levels()
        found = []
        for ancestor_K, names in levels:
            ancestor = torch.from_numpy(ancestor_K).to(class_S.device)
            below_SKM = torch.nn.functional.one_hot(ancestor, len(names)).log().to(logprob_SK)  # -inf where not below
            logprob_SM = (logprob_SK[:, :, None] + below_SKM).logsumexp(1) if len(levels) > 1 else logprob_SK
            found.append(-logprob_SM.gather(1, ancestor[class_S][:, None])[:, 0])
        each_S = torch.stack(found).mean(0)
        return (1 - self.label_smoothing) * each_S - self.label_smoothing * logprob_SK.mean(-1)

    def levels(self) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        """For each level, top first: the number [K] of each class's ancestor, and the ancestors' names."""
        assert self.labels is not None
        paths = [label.split(self.hierarchy) if self.hierarchy else [label] for label in self.labels]
        depth = max(map(len, paths))
        found = []
        for level in range(1, depth + 1):
            ancestors = [(self.hierarchy or "").join(path[:level]) for path in paths]
            names = tuple(dict.fromkeys(ancestors))
            found.append((np.array([names.index(a) for a in ancestors]), names))
        return found

    def _truth(self, values: list[np.ndarray]) -> Floats:
        assert self.labels is not None
        truth_BK = np.zeros((len(values), len(self.labels)))
        for row, classes in enumerate(values):
            truth_BK[row, [int(c) for c in classes if c != NONE]] = 1
        return truth_BK

    def truth(self, examples: list[Example]) -> np.ndarray:
        """Which classes each row has, [B, K] bool; none for a class that is not known."""
        assert self.labels is not None
        number = {label: k for k, label in enumerate(self.labels)}
        truth_BK = np.zeros((len(examples), len(self.labels)), dtype=bool)
        for row, example in enumerate(examples):
            label = label_of(example)
            for name in label if isinstance(label, tuple) else (label,):
                if name in number:
                    truth_BK[row, number[name]] = True
        return truth_BK

    def probabilities(self, output_BK: Floats, *, temperature: float = 1.0) -> Floats:
        """p [B, K]."""
        scaled = torch.from_numpy(np.asarray(output_BK, dtype=np.float64)) / temperature
        found: Floats = (scaled.sigmoid() if self.several else scaled.softmax(-1)).numpy()
        return found

    def calibrated(self, output_BK: Floats, values: list[np.ndarray]) -> Calibration:
        """The temperature of the least log loss, and the threshold that `right_share` or F1 asks for."""
        truth_BK = self._truth(values)

        def log_loss(log_temperature: float) -> float:
            p_BK = np.clip(self.probabilities(output_BK, temperature=np.exp(log_temperature)), 1e-12, 1 - 1e-12)
            other = (1 - truth_BK) * np.log(1 - p_BK) if self.several else 0.0
            return float(-(truth_BK * np.log(p_BK) + other).sum())

        bounds = (np.log(TEMPERATURES[0]), np.log(TEMPERATURES[1]))
        temperature = float(np.exp(minimize_scalar(log_loss, bounds=bounds, method="bounded").x))
        p_BK = self.probabilities(output_BK, temperature=temperature)
        calibration = {"temperature": temperature}
        if self.several and truth_BK.any():  # where no class holds of any row, no threshold is better than another
            calibration["threshold"] = _best_f1(p_BK.ravel(), truth_BK.ravel())
        elif self.right_share is not None:
            right_B = truth_BK[np.arange(len(p_BK)), p_BK.argmax(1)]
            calibration["threshold"] = _sure(p_BK.max(1), right_B, share=self.right_share)
        return calibration

    def predictions(self, output_BK: Floats, *, calibration: Calibration, counts: np.ndarray | None = None) -> Classes:
        """The most likely class, or all above the threshold."""
        assert self.labels is not None
        p_BK = self.probabilities(output_BK, temperature=calibration.get("temperature", 1.0))
        return self.decided(p_BK, threshold=calibration.get("threshold"))

    def decided(self, probability_BK: Floats, *, threshold: float | None = None) -> Classes:
        """The answers that probabilities give."""
        assert self.labels is not None
        if self.several:
            decided_BK = probability_BK >= (0.5 if threshold is None else threshold)
        else:
            decided_BK = np.zeros(probability_BK.shape, dtype=bool)
            decided_BK[np.arange(len(decided_BK)), probability_BK.argmax(1)] = True
            decided_BK &= (probability_BK.max(1) >= (threshold or 0.0))[:, None]
        return Classes(self.labels, probability_BK, decided_BK, bool(self.several), self.hierarchy)


def _borders(p_sorted: Floats) -> NDArray[np.bool_]:
    """Where, of numbers from great to small, a smaller one follows: a threshold does not part equal ones."""
    return np.append(p_sorted[1:] < p_sorted[:-1], True)


def _best_f1(p: Floats, truth: Floats) -> float:
    """The threshold of the best micro F1: 2 TP / (answers + truths)."""
    order = np.argsort(-p, kind="stable")
    f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(p) + 1) + truth.sum())
    best = int(np.where(_borders(p[order]), f1, -1.0).argmax())
    following = p[order[best + 1]] if best + 1 < len(p) else 0.0
    return float((p[order[best]] + following) / 2)


def _sure(p_B: Floats, right_B: Floats, *, share: float) -> float:
    """The least threshold above which at least `share` of the answers are right; above 1 where there is none."""
    order = np.argsort(-p_B, kind="stable")
    shares = np.cumsum(right_B[order]) / np.arange(1, len(p_B) + 1)
    good = np.flatnonzero((shares >= share) & _borders(p_B[order]))
    return float(p_B[order[good[-1]]]) if len(good) else 1.0 + 1e-9
