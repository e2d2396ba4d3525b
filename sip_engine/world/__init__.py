"""The synthetic world: documents with known faults, and a judge and a rewriter that know the truth."""

from sip_engine.world.corrupt import corrupt
from sip_engine.world.documents import Document, Shares, write_document, write_documents
from sip_engine.world.facts import World
from sip_engine.world.judge import WorldJudge
from sip_engine.world.measure import Measures, measure
from sip_engine.world.rewriter import WorldRewriter

__all__ = [
    "Document",
    "Measures",
    "Shares",
    "World",
    "WorldJudge",
    "WorldRewriter",
    "corrupt",
    "measure",
    "write_document",
    "write_documents",
]
