"""What rides with the tokens of a microbatch through the model.

Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class TokenInfo(PackedSeqParams):
    """What layers, attention and the output layer are told about one microbatch's tokens.

    It goes to the model as megatron's ``packed_seq_params``, the one argument that megatron hands as it
    is to every layer of every pipeline stage, to core attention and to the output layer. A part that is
    recomputed keeps the object in its closure and so meets its own microbatch again.

    Nothing changes it once it is made. (Python has no frozen subclass of a dataclass that is not frozen.)

    Attributes:
        tasks_BS: int64, 0 on padding, task index + 1 on real tokens.
        documents_BS: int64, the number of the document in its row; None: no row has two.
        answers_L: int64, the positions with a loss, counted along [S, B] (position * B + row),
            ascending; None: the output layer works on all positions.
    """

    tasks_BS: Tensor
    documents_BS: Tensor | None = None
    answers_L: Tensor | None = None

    def __post_init__(self) -> None:
        # Of the inherited fields megatron reads two unless qkv_format is "thd": for how many positions to make
        # rotary angles.
        self.max_seqlen_q = self.max_seqlen_kv = self.tasks_BS.shape[1]

    @cached_property
    def mask(self) -> Tensor | None:
        """:func:`document_mask` of the documents, made once for all layers."""
        return document_mask(self.documents_BS)


def document_mask(documents_BS: Tensor | None) -> Tensor | None:
    """Who may attend to whom: bool [b, 1, s (query), s (key)], or None where the causal rule says it all.

    A position sees the earlier ones of its own document. Padding counts as one more document,
    and every position sees itself, so no row of the mask is empty (softmax would give NaN).

    Args:
        documents_BS: int64 [b, s], each position's document; None: no row has two of them.
    """
    if documents_BS is None:
        return None
    return (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)).tril().unsqueeze(1)
