"""Classes from a handful of rows each: texts of one class are drawn together, others apart, then a head is fitted.

    loss = sum_(a,b) (cos(h_a, h_b) - [y_a = y_b])^2 / number of pairs              (Tunstall et al. 2022, SetFit, section 3)
    head = argmin_W  sum_s -u_s log softmax(W h_s)_{y_s} + |W|^2 / 2              (logistic regression on the tuned states)

A few rows make many pairs: every row meets `pairs` rows of its class and as many of others, drawn once. What a pack's pairs
have in common is computed once. Ours fits the head without a bias on states scaled to a mean square of one.

Shapes: S sequences, P pairs, D hidden, K classes.
"""

from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from tunesmith.data.answers import Floats
from tunesmith.data.pack import Pack
from tunesmith.objectives.base import Loss, Readout, Reads
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import known


class Contrastive(Classification):
    """A class of a text, from 4 to 64 rows a class."""

    kind: Literal["contrastive"] = "contrastive"  # type: ignore[assignment]
    summary: ClassVar[str] = "classes from a handful of rows each: pairs of texts first, then a head"
    whole_units: ClassVar[bool] = True
    idle: ClassVar[tuple[str, ...]] = ("several", "hierarchy", "label_smoothing", "head_rate_factor")

    pairs: int = Field(default=20, ge=1, description="pairs of one class, and as many of two classes, for each row")

    @property
    def reads(self) -> Reads:
        """Hidden states; the head is there only once they are tuned."""
        return "hidden"

    def rate_factors(self) -> dict[str, float]:
        """None: nothing of its own is trained."""
        return {}

    def groups(self, values: Iterable[np.ndarray]) -> np.ndarray:
        """Pairs [P, 2] of rows, drawn by a fixed seed; none where there is one class, or none with two rows."""
        class_B = np.array([int(v[0]) for v in values])
        rows_of = {k: np.flatnonzero(class_B == k) for k in np.unique(class_B)}
        if len(rows_of) < 2 or max(map(len, rows_of.values()), default=0) < 2:
            return np.zeros((0, 2), dtype=np.int64)
        generator = np.random.default_rng(0)
        found = []
        for row, k in enumerate(class_B):
            same = rows_of[k][rows_of[k] != row]
            other = np.flatnonzero(class_B != k)
            for candidates in (same, other):
                if len(candidates):
                    chosen = generator.choice(candidates, size=self.pairs, replace=len(candidates) < self.pairs)
                    found += [(row, int(mate)) for mate in dict.fromkeys(chosen.tolist())]
        return np.unique(np.sort(np.array(found, dtype=np.int64), axis=1), axis=0)

    def count(self, pack: Pack) -> float:
        """Pairs."""
        return len(pack.rows_S) / 2

    def loss(self, readout: Readout, pack: Pack) -> Loss:
        """Squared distance of the cosine from 1 or 0; `accuracy` is the share of pairs on the right side of a half."""
        state_SD = torch.nn.functional.normalize(self.pooled(readout), dim=-1)
        order = np.argsort(pack.rows_S, kind="stable").reshape(-1, 2)
        values = np.array([v[0] for v in known(pack)])
        same_P = state_SD.new_tensor(values[order[:, 0]] == values[order[:, 1]])
        first, second = (torch.from_numpy(order[:, side]).to(state_SD.device) for side in (0, 1))
        cosine_P = (state_SD[first] * state_SD[second]).sum(-1)
        right = float(((cosine_P.detach() > 0.5) == (same_P > 0.5)).sum())
        return Loss(((cosine_P - same_P) ** 2).sum(), self.count(pack), {"accuracy": (right, float(len(order)))})

    def fitted_head(self, state_BD: Floats, values: list[np.ndarray]) -> Floats:
        """Weights [K, D] of the head, of tuned states and the classes of the training rows."""
        x_BD = torch.from_numpy(state_BD)
        scale = x_BD.square().mean().sqrt().clamp(min=1e-12)
        class_B = torch.tensor([int(v[0]) for v in values])
        weight_B = torch.tensor([self.row_weight(v) for v in values], dtype=x_BD.dtype)
        head_KD = torch.zeros(self.num_outputs, x_BD.shape[1], dtype=x_BD.dtype, requires_grad=True)
        solver = torch.optim.LBFGS([head_KD], max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            solver.zero_grad()
            nll_B = torch.nn.functional.cross_entropy(x_BD / scale @ head_KD.T, class_B, reduction="none")
            total = (weight_B * nll_B).sum() + head_KD.square().sum() / 2
            total.backward()  # type: ignore[no-untyped-call]
            return total

        solver.step(closure)  # type: ignore[no-untyped-call]
        found: Floats = (head_KD.detach() / scale).numpy()
        return found
