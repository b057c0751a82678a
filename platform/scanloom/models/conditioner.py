"""Attributes to tokens: the learned condition of the attribute families.

Legend of shape suffixes: B batch, A attributes, F feature columns, D token width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scanloom.attributes import Attributes, AttributeSchema
from scanloom.recipe import AttributeDeclaration, CategoryAttribute, NumberAttribute

FREQUENCIES = 8


def feature_widths(schema: AttributeSchema) -> list[int]:
    """Feature columns of each attribute: category 1, number 2, labels 1 + number of labels."""
    return [_width(d) for d in schema.declarations]


def features(schema: AttributeSchema, rows: Sequence[Attributes]) -> NDArray[np.float32]:
    """Numeric form [B, F] float32 of attribute values.

    Category: index from 1, 0 unknown. Number: scaled to [0, 1] over the declared range, then 1 (0, 0 unknown).
    Labels: 1 (0 unknown), then one 0/1 column a label.
    """
    table = np.zeros((len(rows), sum(feature_widths(schema))), dtype=np.float32)
    column = 0
    for declaration in schema.declarations:
        for index, row in enumerate(rows):
            _fill(declaration, row.get(declaration.name), table[index, column:])
        column += _width(declaration)
    return table


def _width(declaration: AttributeDeclaration) -> int:
    if isinstance(declaration, CategoryAttribute):
        return 1
    return 2 if isinstance(declaration, NumberAttribute) else 1 + len(declaration.values)


def _fill(declaration: AttributeDeclaration, value: object, out: NDArray[np.float32]) -> None:
    if value is None:
        return
    if isinstance(declaration, CategoryAttribute):
        out[0] = 1 + declaration.values.index(str(value))
    elif isinstance(declaration, NumberAttribute):
        out[0] = (float(str(value)) - declaration.minimum) / (declaration.maximum - declaration.minimum)
        out[1] = 1.0
    elif isinstance(value, tuple):
        out[0] = 1.0
        for label in value:
            out[1 + declaration.values.index(label)] = 1.0


class AttributeConditioner(nn.Module):
    """One learned token of width D per attribute; an unknown attribute has a learned token of its own.

    Numbers pass Fourier features (Tancik et al. 2020) at FREQUENCIES octaves and a small network. The labels token is
    the sum of its labels' embeddings on a "known" base, so that the empty set differs from unknown. The null
    condition of classifier-free guidance (Ho & Salimans 2022) is every attribute unknown.
    """

    def __init__(self, schema: AttributeSchema, width: int) -> None:
        super().__init__()
        self.schema = schema
        self.width = width
        self.unknown = nn.Parameter(torch.randn(len(schema.declarations), width) * 0.5)
        self.encoders = nn.ModuleList(_encoder(d, width) for d in schema.declarations)
        self.norm = nn.LayerNorm(width)

    def forward(self, features_BF: Tensor, drop_BA: Tensor | None = None) -> Tensor:
        """Tokens [B, A, D] of features [B, F]; where bool `drop_BA` is set the attribute counts as unknown."""
        tokens, known = [], []
        for encoder, part in zip(self.encoders, features_BF.split(feature_widths(self.schema), dim=1), strict=True):
            tokens.append(encoder(part.to(self.unknown.dtype)) if isinstance(encoder, nn.Linear) else encoder(part))
            known.append(part[:, -1] > 0 if isinstance(encoder, _NumberEncoder) else part[:, 0] > 0)
        tokens_BAD, known_BA = torch.stack(tokens, 1), torch.stack(known, 1)
        if drop_BA is not None:
            known_BA = known_BA & ~drop_BA
        chosen: Tensor = self.norm(torch.where(known_BA[..., None], tokens_BAD, self.unknown))
        return chosen


def _encoder(declaration: AttributeDeclaration, width: int) -> nn.Module:
    if isinstance(declaration, CategoryAttribute):
        return _CategoryEncoder(len(declaration.values), width)
    if isinstance(declaration, NumberAttribute):
        return _NumberEncoder(width)
    return nn.Linear(1 + len(declaration.values), width, bias=False)


class _CategoryEncoder(nn.Module):
    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(values + 1, width)

    def forward(self, index_B1: Tensor) -> Tensor:
        embedded: Tensor = self.table(index_B1[:, 0].long())
        return embedded


class _NumberEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2 * FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value_B2: Tensor) -> Tensor:
        # In float32 whatever the network's precision: at the top octave, bfloat16's rounding is most of a period.
        scaled_B1 = value_B2[:, :1].float()
        angles = scaled_B1 * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=value_B2.device)
        waves = torch.cat([scaled_B1, angles.sin(), angles.cos()], dim=1)
        embedded: Tensor = self.network(waves.to(next(self.network.parameters()).dtype))
        return embedded
