"""Embeddings: the masked mean of transformers' own padded batch, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.errors import ModelError
from tunesmith.models.embed import embed_texts, load_embedder
from tunesmith.models.load import Model

TEXTS = ["a", "some words", "", "long " * 30, "some words", "Ünïcödé [SEP] text"]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"])
def test_embeddings_are_the_masked_mean_of_a_padded_batch(
    architecture: str, build_model: Callable[..., Model], eager_twin: Callable[[Model], Any]
) -> None:
    model = build_model(architecture)
    tokenizer = model.tokenizer
    room = model.context_tokens - 2
    rows = [[*tokenizer.begin_ids, *ids[:room], *tokenizer.end_ids] for ids in tokenizer.encode_text(TEXTS)]
    padding = int(model.causal.config.pad_token_id)
    length = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        hidden = eager_twin(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(mean, dim=-1).numpy()
    found = embed_texts(model, TEXTS)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)


def test_no_texts_and_float32(build_model: Callable[..., Model]) -> None:
    model = build_model("bert", dtype=torch.float32)
    assert embed_texts(model, []).shape == (0, model.hidden_size)
    assert embed_texts(model, ["a"]).dtype == np.float32


def test_an_embedder_is_loaded_from_a_folder_and_must_be_an_encoder(
    tmp_path: Path, build_model: Callable[..., Model]
) -> None:
    model = build_model("bert", dtype=torch.float32)
    model.save(tmp_path / "encoder")
    np.testing.assert_array_equal(load_embedder(str(tmp_path / "encoder"))(TEXTS), embed_texts(model, TEXTS))
    with pytest.raises(ModelError, match="no encoder"):
        load_embedder("starter")
