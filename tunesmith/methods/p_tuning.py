"""P-tuning: virtual tokens' embeddings come from a small encoder (Liu et al. 2021, eq. 5-6).

    h = e + MLP([LSTM_forward(E); LSTM_backward(E)])  or  h = e + MLP(E),      E [P, D] and the encoder trained

Ours differs in the residual e, the embeddings of real tokens, with the encoder's last layer zero at the start: it begins
at a real prompt, where the paper's begins anywhere. Only h is saved.

Shapes: P virtual tokens, D hidden, W the encoder's width.
"""

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tunesmith.methods.prompt import Prompt, embeddings
from tunesmith.models.load import Model
from tunesmith.models.virtual import Virtual, VirtualTokens


class Encoded(VirtualTokens):
    """Virtual tokens whose embeddings an encoder computes from trained inputs."""

    def __init__(self, start_PD: Tensor, *, width: int, lstm: bool):
        num_tokens, hidden = start_PD.shape
        super().__init__(num_tokens)
        self.register_buffer("start_PD", start_PD)
        self.inputs_PD = nn.Parameter(start_PD.clone())
        self.lstm = nn.LSTM(hidden, width, bidirectional=True, batch_first=True) if lstm else None
        last = nn.Linear(width, hidden)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(2 * width if lstm else hidden, width), nn.ReLU(), last)

    def forward(self) -> Virtual:
        """What the encoder makes of its inputs."""
        inputs_PD = self.inputs_PD if self.lstm is None else self.lstm(self.inputs_PD)[0]
        return Virtual(self.num_tokens, embeddings_PD=cast(Tensor, self.start_PD) + self.mlp(inputs_PD))


class PTuning(Prompt):
    """Virtual tokens whose embeddings a small encoder computes."""

    kind: Literal["p_tuning"] = "p_tuning"  # type: ignore[assignment]
    summary: ClassVar[str] = "virtual tokens whose embeddings a small encoder computes"
    learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str | None] = "P_TUNING"
    encoder: Literal["lstm", "mlp"] = Field(default="mlp", description="what computes the embeddings while training")
    width: int = Field(default=128, ge=1, description="of the encoder's hidden layer")

    def make(self, model: Model, *, start_P: Tensor, generator: torch.Generator) -> VirtualTokens:
        """An encoder that begins at real tokens' embeddings."""
        return Encoded(embeddings(model, tokens_P=start_P), width=self.width, lstm=self.encoder == "lstm")

    def config(self, model: Model) -> dict[str, object]:
        """PEFT's PromptEncoderConfig."""
        return {"encoder_reparameterization_type": self.encoder.upper(), "encoder_hidden_size": self.width}
