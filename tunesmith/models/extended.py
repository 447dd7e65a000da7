"""New rows of the input table and of the vocabulary head, beside the base's own rows, which stay as they are.

    E = [E_old; E_new],   e_new = mean of the rows of the tokens that the base spelled the new token with

The mean keeps a new token where the words it is made of are, so the first loss is finite and near the base's (Hewitt 2021,
"Initializing New Word Embeddings"; Yamaguchi et al. 2024). The old table is never copied: only new rows are trained, counted
and saved, in PEFT's form for single tokens. Rows that no token of the base has (padding of the table) are left out, so a
vocabulary ends with its last token.

Shapes: T tokens, O old rows, N new rows, D hidden.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from tunesmith.models.load import Model

SAVED = "token_adapter.trainable_tokens_delta"  # PEFT's name for the rows of single tokens
SAVED_BIASES = "token_adapter.biases"  # PEFT has none
NEW_PARAMETERS = ("new_rows", "new_biases")


class ExtendedEmbedding(nn.Module):
    """The base's input embedding for ids below `first`, rows of its own for those from there on."""

    def __init__(self, base: nn.Embedding, *, rows_ND: Tensor, first: int):
        super().__init__()
        self.base, self.first = base, first
        self.new_rows = nn.Parameter(rows_ND)
        self._scaled = any(name == "embed_scale" for name, _ in base.named_buffers())
        if type(base) is not nn.Embedding and not self._scaled:
            raise ModelError(
                f"the input embedding is a {type(base).__name__}, which new rows cannot stand beside",
                hint="leave objective.new_tokens out",
            )

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..., T] -> [..., T, D], in the base's dtype."""
        is_new = ids >= self.first
        old: Tensor = self.base(ids.masked_fill(is_new, 0))
        new = nn.functional.embedding((ids - self.first).clamp(min=0), self.new_rows)
        if self._scaled:
            new = new * self.base.get_buffer("embed_scale").to(new.dtype)
        return torch.where(is_new[..., None], new.to(old.dtype), old)

    def folded(self) -> nn.Embedding:
        """The base's embedding with all rows."""
        weight = self.base.weight
        rows = torch.cat([weight[: self.first], self.new_rows.to(weight.dtype)])
        self.base.weight = nn.Parameter(rows.detach(), requires_grad=weight.requires_grad)
        self.base.num_embeddings = len(rows)
        return self.base


class ExtendedHead(nn.Linear):
    """The base's vocabulary head (`weight`, `bias`), and rows of its own for the ids from `first` on."""

    def __init__(self, base: nn.Linear, *, rows: nn.Parameter, biases_N: Tensor | None, first: int):
        nn.Module.__init__(self)  # nn.Linear's would make a table
        self.in_features, self.out_features, self.first = base.in_features, first + len(rows), first
        self.weight, self.bias = base.weight, base.bias
        self.new_rows = rows
        self.new_biases = None if biases_N is None else nn.Parameter(biases_N)

    def old(self) -> tuple[Tensor, Tensor | None]:
        """Weight [O, D] and bias [O] of the base's tokens; nothing is copied."""
        return self.weight[: self.first], None if self.bias is None else self.bias[: self.first]

    def forward(self, x: Tensor) -> Tensor:
        """All logits [..., O + N]; training and generation read them through models/readout.py."""
        old = nn.functional.linear(x, *self.old())
        new = nn.functional.linear(x, self.new_rows.to(x.dtype), self.new_biases)
        return torch.cat([old, new.to(old.dtype)], dim=-1)

    def folded(self, *, weight: nn.Parameter | None) -> nn.Linear:
        """An ordinary head with all rows; `weight` is the input table where they are one."""
        old, bias = self.old()
        with torch.device("meta"):
            head = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        if weight is None:
            rows = torch.cat([old, self.new_rows.to(old.dtype)]).detach()
            weight = nn.Parameter(rows, requires_grad=self.weight.requires_grad)
        head.weight = weight
        if bias is not None:
            biases = torch.cat([bias, cast(Tensor, self.new_biases).to(bias.dtype)]).detach()
            head.bias = nn.Parameter(biases, requires_grad=bias.requires_grad)
        return head


def extend_tables(model: "Model", *, first: int, num_new: int, pieces: list[list[int]] | None = None) -> None:
    """Put `num_new` rows behind row `first` of the input table and of the head; tied tables stay tied.

    `pieces` are the old ids that each new row begins as the mean of; without them rows are zero, to be read from a file.
    """
    base: nn.Embedding = model.causal.get_input_embeddings()
    head = model.head
    if first > len(base.weight):
        raise ModelError(
            f"the tokenizer's largest id is {first - 1:,} and the input table has {len(base.weight):,} rows",
            file=model.folder,
            hint="use the tokenizer that belongs to the model",
        )
    tied = head.weight is base.weight
    embedding = ExtendedEmbedding(base, rows_ND=_means(base.weight, pieces, num_new), first=first)
    own = embedding.new_rows if tied else nn.Parameter(_means(head.weight, pieces, num_new))
    biases = None if head.bias is None else _means(head.bias, pieces, num_new)
    model.causal.set_input_embeddings(embedding)
    model.causal.set_output_embeddings(ExtendedHead(head, rows=own, biases_N=biases, first=first))
    model.causal.config.vocab_size = first + num_new


def extend_alike(model: "Model", *, like: "Model") -> None:
    """Room for as many new rows as another model has, to be read from a file. Nothing to do where it has none."""
    if isinstance(like.head, ExtendedHead):
        extend_tables(model, first=like.head.first, num_new=len(like.head.new_rows))


def fold_tables(model: "Model") -> None:
    """Ordinary tables that hold all rows. Nothing to do where none were added."""
    head, embedding = model.head, model.causal.get_input_embeddings()
    if not isinstance(head, ExtendedHead):
        return
    assert isinstance(embedding, ExtendedEmbedding)
    tied = head.new_rows is embedding.new_rows
    plain = embedding.folded()
    shared = cast(nn.Parameter, plain.weight) if tied else None
    model.causal.set_input_embeddings(plain)
    model.causal.set_output_embeddings(head.folded(weight=shared))


def train_new_rows(model: "Model") -> None:
    """New rows move, whatever else does. Nothing to do where there are none."""
    for row in new_rows(model).values():
        row.requires_grad_(True)


def new_rows(model: "Model") -> dict[str, nn.Parameter]:
    """The parameters of new tokens, tied ones once, by the name that a file has for each; none without new tokens."""
    found: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.causal.named_modules():
        if isinstance(module, ExtendedEmbedding | ExtendedHead) and module.new_rows not in seen:
            found[f"{name}.{SAVED}"] = module.new_rows
            seen.add(module.new_rows)
        if isinstance(module, ExtendedHead) and module.new_biases is not None:
            found[f"{name}.{SAVED_BIASES}"] = module.new_biases
    return found


def token_indices(model: "Model") -> dict[str, list[int]]:
    """The ids of new tokens by the module that has their rows, as PEFT writes them; empty without new tokens."""
    names = [name.removesuffix(f".{SAVED}") for name in new_rows(model) if name.endswith(SAVED)]
    modules: list[Any] = [model.causal.get_submodule(name) for name in names]
    return {
        name: list(range(module.first, module.first + len(module.new_rows)))
        for name, module in zip(names, modules, strict=True)
    }


def _means(table: Tensor, pieces: list[list[int]] | None, num_new: int) -> Tensor:
    """The mean row of each list of ids [N, ...], added up in float32 at least, in the table's dtype."""
    if pieces is None:
        return table.new_zeros((num_new, *table.shape[1:]))
    wide = torch.promote_types(table.dtype, torch.float32)
    with torch.no_grad():
        rows = [table[torch.tensor(ids, device=table.device)].to(wide).mean(0) for ids in pieces]
        return torch.stack(rows).to(table.dtype)
