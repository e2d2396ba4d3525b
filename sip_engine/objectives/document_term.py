"""A next-token term on the documents' own suffixes, beside the loss of any objective that learns from pools.

Preferences alone let the policy forget how the documents go on (`objective.document_nll_weight`, w). With the
objective's loss l_r and units u_r of each row r of an update (a pair, or the tokens trained on), its prefix p and the
n tokens o of the document's own suffix:

    loss = sum_r (l_r + w * u_r * m_r) / sum_r u_r        m_r = -1/n * sum_t log policy(o_t | p, o_<t)

so that w weighs nats a token of the original against the objective's own mean, whatever the suffixes' lengths and
however the rows lie in micro-batches and on processes. The suffix is packed into its row: the prefix is read once.
The objective sees nothing of it, and its term needs no reference policy. An original that is also chosen or rejected
stands in the row twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sip_engine.policy.rows import LossSums, Row, SideValues
from sip_engine.types import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from sip_engine.policy.packing import PackedRows


def with_document(row: Row, sample: Sample, weight: float, units: int) -> Row:
    """The row with its document's own suffix as the last one; unchanged at weight 0.

    units: u_r of the row. A suffix of one token after an empty prefix has nothing to predict, and is not added.
    """
    assert not row.labels and not row.document_weight, "a row of text, without a document yet"
    scored = len(sample.suffix_ids) - (len(row.prefix) == 0)
    if not weight or scored < 1:
        return row

    def longer(values: SideValues) -> SideValues:
        return (*values, None) if values else ()

    return replace(
        row,
        suffixes=(*row.suffixes, sample.suffix_ids),
        sampled=longer(row.sampled),
        advantages=longer(row.advantages),
        weights=longer(row.weights),
        document_weight=weight * units / scored,
    )


def add_document_term(found: LossSums, log_probs: Tensor, rows: PackedRows) -> LossSums:
    """The objective's loss with the documents' term; logs `document_nll` (nats) and `document_tokens`, both sums.

    log_probs: [num_targets] float32 nats, of all targets of `rows`, differentiable.
    """
    assert rows.document_weights is not None
    term = -(log_probs * rows.document_weights).sum()
    documents = rows.document_weights > 0
    logged = {
        "document_nll": -(log_probs.detach() * documents).double().sum(),
        "document_tokens": float(sum(rows.target_lens[n] for n in rows.document_suffixes)),
    }
    return found._replace(loss=found.loss + term, sums={**found.sums, **logged})
